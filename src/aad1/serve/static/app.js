// The page of `aad1 serve`. One websocket: commands as JSON out, JSON and frames in.
// A frame is two bytes with the length of a JSON header, the header, and a picture file.

const $ = (id) => document.getElementById(id);
const query = new URLSearchParams(location.search);
const token = query.get("token");
const watch = query.get("watch");
const url = (path) => (token ? `${path}?token=${encodeURIComponent(token)}` : path);
const KEYS = { ArrowUp: "up", KeyW: "up", ArrowDown: "down", KeyS: "down", ArrowLeft: "left",
  KeyA: "left", ArrowRight: "right", KeyD: "right", KeyQ: "strafe-left", KeyE: "strafe-right",
  Space: "still" };
const SIGNS = { up: "↑", down: "↓", left: "←", right: "→", "up+left": "↖", "up+right": "↗",
  "strafe-left": "⇤", "strafe-right": "⇥", still: "■" };
const PAD = ["up+left", "up", "up+right", "left", "still", "right", "strafe-left", "down",
  "strafe-right"];

let socket, info, role = "owner", status = "idle", chosen = null, generation = -1, nextId = 1;
let recording = false, last = {}, latestFrame = null, ended = null;
const asked = new Map();   // id of a command -> when it was sent
const pending = [];        // switches whose first frame has not been drawn: {steer, time}
const drawn = [];          // times of the frames of the last WINDOW
const WINDOW = 3000;       // milliseconds over which frames are counted, stalls included
let countedFrom = null;    // the first frame since the video began or went on
let heardAt = 0;           // when the server last sent its figures
const latencies = [];      // {time, seconds}
const rates = [];          // {time, fps}
const held = new Set();
// For tests and for the curious: what this page has seen.
window.aad1 = { frames: 0, fps: 0, latencies: [], steer: -1, dropped: 0 };

function say(text, bad = false) {
  $("status").textContent = text;
  $("status").classList.toggle("bad", bad);
}

function send(command, payload = null) {
  if (!socket || socket.readyState !== WebSocket.OPEN) { say("not connected", true); return; }
  command.id = nextId++;
  asked.set(command.id, performance.now());
  const text = JSON.stringify(command);
  if (!payload) { socket.send(text); return; }
  const header = new TextEncoder().encode(text);
  const length = new Uint8Array([header.length >> 8, header.length & 255]);
  socket.send(new Blob([length, header, payload]));
}

// ---- what the server says -----------------------------------------------------------------------

function connect() {
  const address = new URL("ws", location.href);
  address.protocol = location.protocol === "https:" ? "wss:" : "ws:";
  address.search = "";
  if (token) address.searchParams.set("token", token);
  if (watch) address.searchParams.set("session", watch);
  socket = new WebSocket(address);
  socket.binaryType = "arraybuffer";
  let refused = null;
  heardAt = performance.now();
  socket.onmessage = (event) => {
    if (typeof event.data !== "string") { frame(event.data); return; }
    const message = JSON.parse(event.data);
    if (message.type === "error" && !info) refused = message;
    (heard[message.type] || (() => {}))(message);
  };
  socket.onclose = () => {
    status = "idle"; setStatus();
    for (const id of ["start", "send"]) $(id).disabled = true;
    if (refused && refused.code === "not_ready") { setTimeout(connect, 500); return; }
    if (refused) say(refused.message, true);
    else if (info) say(`${ended || "the connection has ended"}; reload the page to begin anew`, true);
    else say(`no connection: the token in this page's address is ${token ? "wrong" : "missing"}, ` +
      "or the server has stopped", true);
  };
}

const heard = {
  hello(message) {
    info = message.info; role = message.role; status = message.status;
    const prompts = info.words.length ? `; it knows: ${info.words.join(", ")}` : "";
    $("model").textContent = `${info.name}: ${info.width}x${info.height}, ` +
      `${info.fps} frames a second, chunks of ${info.chunk_frames}`;
    $("known").textContent = prompts ? `The model has few words${prompts}.` : "";
    $("screen").width = info.width; $("screen").height = info.height;
    $("prompt").value = message.prompt;
    gallery(); keypad(); setStatus();
    if (role === "viewer") { say("watching a session"); $("hint").hidden = true; return; }
    const link = new URL(location.href);
    link.searchParams.set("watch", message.session);
    $("share").replaceChildren("Others may watch (not steer): ");
    const a = document.createElement("a");
    a.href = link; a.textContent = "link to this session"; a.style.color = "inherit";
    $("share").append(a);
    say("choose a picture and press Start, or drop one on the video");
  },
  ack(message) {
    const time = asked.get(message.id);
    asked.delete(message.id);
    if (message.steer !== undefined) pending.push({ steer: message.steer, time });
    if (message.generation !== undefined) {
      generation = message.generation; pending.length = 0; $("hint").hidden = true;
    }
    if (message.command === "record") {
      if (message.url) recorded(message); else { recording = true; $("download").hidden = true; }
      recordButton();
    }
    if (message.unknown_words) say(`without effect: ${message.unknown_words.join(", ")}`, true);
    else if (message.command !== "record") say("");
  },
  error(message) {
    asked.delete(message.id);
    if (message.code === "recording_failed") { recording = false; recordButton(); }
    say(message.message, true);
  },
  status(message) {
    heardStatus(message.status);
    if (role === "viewer") $("prompt").value = message.prompt;
  },
  recorded(message) { recorded(message); recordButton(); },
  ended(message) { ended = `the session has ended${message.reason ? `: ${message.reason}` : ""}`; },
  stats(message) {
    last = message; heardAt = performance.now(); heardStatus(message.status); figures();
  },
};

function recorded(message) {
  recording = false;
  const link = $("download");
  link.href = url(message.url); link.download = "aad1.mp4"; link.hidden = false;
  link.textContent = `Download (${message.frames} frames, ${message.seconds.toFixed(1)} s)`;
  say(message.reason ? `the recording has ended: ${message.reason}` : "recorded", !!message.reason);
}

async function frame(buffer) {
  const length = new DataView(buffer).getUint16(0);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 2, length)));
  if (role === "owner" && header.generation < generation) return; // of a video that was reset
  const picture = await createImageBitmap(new Blob([new Uint8Array(buffer, 2 + length)]));
  if (latestFrame && latestFrame.generation === header.generation &&
      latestFrame.number > header.number) { picture.close(); return; }
  latestFrame = header;
  $("hint").hidden = true;
  $("screen").getContext("2d").drawImage(picture, 0, 0);
  picture.close();
  const now = performance.now();
  if (countedFrom === null) countedFrom = now; else drawn.push(now);
  window.aad1.frames += 1; window.aad1.steer = header.steer; window.aad1.number = header.number;
  while (pending.length && pending[0].steer <= header.steer) {
    const item = pending.shift();
    if (item.steer !== header.steer) continue; // another switch came before it was to be seen
    const seconds = (now - item.time) / 1000;
    latencies.push({ time: now, seconds });
    window.aad1.latencies.push(seconds);
    if (window.aad1.latencies.length > 500) window.aad1.latencies.shift();
  }
}

// ---- figures ------------------------------------------------------------------------------------

function figures() {
  const now = performance.now();
  while (drawn.length && drawn[0] <= now - WINDOW) drawn.shift();
  const span = countedFrom === null ? 0 : Math.min(WINDOW, now - countedFrom);
  const fps = span > 300 ? (1000 * drawn.length) / span : 0;
  window.aad1.fps = fps; window.aad1.dropped = last.dropped_frames;
  rates.push({ time: now, fps });
  while (rates.length && rates[0].time < now - 60000) rates.shift();
  while (latencies.length && latencies[0].time < now - 60000) latencies.shift();
  const latest = latencies.length ? latencies[latencies.length - 1].seconds : null;
  const show = (value, unit, digits = 0) =>
    value === null || value === undefined ? "–" : `${value.toFixed(digits)} ${unit}`;
  const slow = last.speed !== null && last.speed < 1;
  const rows = {
    "FPS on this page": show(fps, `of ${info.fps}`, 1),
    speed: last.speed === null ? "–"
      : `${last.speed.toFixed(2)}x real time${slow ? " (slower than real time)" : ""}`,
    "one chunk": show(last.chunk_ms, "ms"),
    "network / decode / pack": `${show(last.dit_ms, "")}/ ${show(last.decode_ms, "")}/ ` +
      show(last.pack_ms, "ms"),
    "frames waiting": show(last.queued_frames, ""),
    "to first frame": show(latest, "s", 2),
    "stalls": show(last.stalls, ""),
    "frames dropped on the way": show(last.dropped_frames, ""),
  };
  $("figures").replaceChildren(...Object.entries(rows).flatMap(([name, value]) => {
    const dt = document.createElement("dt"), dd = document.createElement("dd");
    dt.textContent = name; dd.textContent = value;
    return [dt, dd];
  }));
  graph(now);
  const silent = now - heardAt;
  if (socket.readyState === WebSocket.OPEN && silent > 5000) {
    say(`the server has sent nothing for ${Math.round(silent / 1000)} seconds`, true);
  }
}

function graph(now) {
  const canvas = $("graph"), g = canvas.getContext("2d"), { width, height } = canvas;
  const chunk = info.chunk_frames / info.fps;
  const x = (time) => width - ((now - time) / 60000) * width;
  const y = (share) => height - 8 - share * (height - 24);
  g.clearRect(0, 0, width, height);
  g.font = "11px system-ui"; g.fillStyle = "#9db0c2";
  g.fillText(`line: FPS (top ${1.25 * info.fps})   dots: to first frame (top ${(2.5 * chunk).toFixed(1)} s)`, 4, 11);
  g.strokeStyle = "#2b3a49"; g.beginPath();
  g.moveTo(0, y(0.8)); g.lineTo(width, y(0.8)); g.stroke();
  g.strokeStyle = "#7fd1ae"; g.beginPath();
  rates.forEach((r, k) => g[k ? "lineTo" : "moveTo"](x(r.time), y(Math.min(1, r.fps / (1.25 * info.fps)))));
  g.stroke();
  g.fillStyle = "#ffb86b";
  for (const l of latencies) {
    g.beginPath(); g.arc(x(l.time), y(Math.min(1, l.seconds / (2.5 * chunk))), 3, 0, 7); g.fill();
  }
}

// ---- what the user does -------------------------------------------------------------------------

function heardStatus(now) {
  if (now === "running" && status !== "running") { countedFrom = null; drawn.length = 0; }
  status = now;
  setStatus();
}

function setStatus() {
  const on = status !== "idle" && role === "owner";
  $("pause").textContent = status === "paused" ? "Resume" : "Pause";
  for (const id of ["pause", "reset", "stop", "record", "send"]) $(id).disabled = !on;
  if (recording) $("record").disabled = false;
  $("start").disabled = role !== "owner" || !info;
}

function recordButton() {
  $("record").classList.toggle("on", recording);
  $("record").textContent = recording ? "Stop recording" : "Record";
  setStatus();
}

const seed = () => Math.max(0, Math.trunc(Number($("seed").value)) || 0);

async function begin() {
  const command = { type: "start", prompt: $("prompt").value, seed: seed() };
  if (chosen instanceof Blob) { send(command, chosen); return; }
  if (chosen) command.sample = chosen;
  send(command);
}

function steer(prompt) {
  $("prompt").value = prompt;
  const name = Object.keys(info.keys).find((k) => info.keys[k] === prompt);
  for (const button of $("keys").children) {
    button.setAttribute("aria-pressed", String(button.dataset.key === name));
  }
  if (status === "idle") return;
  send({ type: "prompt", prompt, blend: Number($("blend").value) });
}

// A picture of any size or kind that the browser knows, small enough to be sent.
async function take(file) {
  try {
    const picture = await createImageBitmap(file, { imageOrientation: "from-image" });
    const scale = Math.min(1, 2048 / Math.max(picture.width, picture.height));
    const canvas = document.createElement("canvas");
    canvas.width = Math.max(1, Math.round(picture.width * scale));
    canvas.height = Math.max(1, Math.round(picture.height * scale));
    canvas.getContext("2d").drawImage(picture, 0, 0, canvas.width, canvas.height);
    const small = canvas.width * canvas.height <= 512 * 512;
    chosen = await new Promise((done) => canvas.toBlob(done, small ? "image/png" : "image/jpeg", 0.95));
  } catch { say(`${file.name} is not a picture that this browser can read`, true); return; }
  pick(null);
  preview(chosen);
  if (!$("start").disabled) begin();
}

async function preview(blob) {
  if (status !== "idle") return;
  const picture = await createImageBitmap(blob), { width, height } = $("screen");
  const scale = Math.max(width / picture.width, height / picture.height);
  const w = picture.width * scale, h = picture.height * scale;
  $("screen").getContext("2d").drawImage(picture, (width - w) / 2, (height - h) / 2, w, h);
}

function pick(name) {
  for (const button of $("gallery").children) {
    button.setAttribute("aria-pressed", String(button.dataset.name === name));
  }
}

function gallery() {
  $("gallery").replaceChildren(...Object.entries(info.samples).map(([name, prompt]) => {
    const button = document.createElement("button"), image = document.createElement("img");
    button.dataset.name = name; button.type = "button";
    button.setAttribute("aria-pressed", "false");
    image.src = url(`api/samples/${name}`); image.alt = `Sample ${name}: ${prompt}`;
    button.append(image);
    button.onclick = async () => {
      chosen = name; pick(name); $("prompt").value = prompt;
      if (status !== "idle") begin();
      else preview(await (await fetch(url(`api/samples/${name}`))).blob());
    };
    return button;
  }));
  $("words").replaceChildren(...[...new Set(Object.values(info.samples))].map((prompt) => {
    const option = document.createElement("option");
    option.value = prompt;
    return option;
  }));
  const first = Object.keys(info.samples)[0];
  if (first && role === "owner") $("gallery").firstChild.click();
}

function keypad() {
  const names = PAD.filter((name) => name in info.keys);
  $("keys").hidden = !names.length || role !== "owner";
  $("keys").replaceChildren(...names.map((name) => {
    const button = document.createElement("button");
    button.type = "button"; button.dataset.key = name;
    button.textContent = SIGNS[name]; button.title = info.keys[name];
    button.setAttribute("aria-pressed", "false");
    button.setAttribute("aria-label", info.keys[name]);
    button.onclick = () => steer(info.keys[name]);
    return button;
  }));
}

function typing(target) { return target instanceof HTMLElement && target.matches("input, select"); }

// What the keys held down ask for together, or else the last of them by itself.
function steerHeld() {
  const both = [...held].sort((a, b) => (a === "up" ? -1 : b === "up" ? 1 : 0)).join("+");
  steer(info.keys[both] || info.keys[[...held].pop()]);
}

addEventListener("keydown", (event) => {
  const key = KEYS[event.code];
  if (!key || !info || role !== "owner") return;
  if (typing(event.target) || event.ctrlKey || event.metaKey || event.altKey) return;
  if (key === "still" && event.target instanceof HTMLButtonElement) return; // presses the button
  if (!(key in info.keys) || status === "idle") return;
  event.preventDefault();
  if (event.repeat) return;
  held.add(key);
  steerHeld();
});
addEventListener("keyup", (event) => {
  if (held.delete(KEYS[event.code]) && held.size && status !== "idle") steerHeld();
});
addEventListener("blur", () => held.clear());

// After a click (not after the keyboard) the space bar is a key of the world again.
addEventListener("click", (event) => { if (event.detail) event.target.closest("button")?.blur(); });
$("start").onclick = begin;
$("steer").onsubmit = (event) => { event.preventDefault(); steer($("prompt").value); };
$("pause").onclick = () => send({ type: status === "paused" ? "resume" : "pause" });
$("reset").onclick = () => send({ type: "reset", seed: seed() });
$("stop").onclick = () => send({ type: "stop" });
$("record").onclick = () => send({ type: "record", on: !recording });
$("file").onchange = (event) => {
  event.target.blur();
  if (event.target.files[0]) take(event.target.files[0]);
};
for (const name of ["dragenter", "dragover"]) {
  $("drop").addEventListener(name, (event) => { event.preventDefault(); $("drop").classList.add("over"); });
}
$("drop").addEventListener("dragleave", () => $("drop").classList.remove("over"));
$("drop").addEventListener("drop", (event) => {
  event.preventDefault();
  $("drop").classList.remove("over");
  const file = event.dataTransfer.files[0];
  if (file) take(file); else say("what was dropped is no file", true);
});
// Beside the picture a file would replace the page.
for (const name of ["dragover", "drop"]) {
  addEventListener(name, (event) => {
    if (event.dataTransfer?.types.includes("Files")) event.preventDefault();
  });
}
setInterval(() => info && figures(), 1000);
connect();
