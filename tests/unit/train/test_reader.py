"""Batches are read ahead: the same ones, in the same order, and without waiting for them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from itertools import count
from typing import Any

import pytest
import torch
from torch import nn

from aad1.errors import UserError
from aad1.parallel.mesh import MeshShape, Processes
from aad1.stages.base import Batch, Logs, Loss, Rng, randn
from aad1.train import reader as reader_module
from aad1.train.config import OptimConfig
from aad1.train.loop import Trainer
from aad1.train.reader import Reader
from aad1.train.throughput import Throughput

CPU = torch.device("cpu")


class Disk:
    """Sample n is n in float16; what is read is noted, and may be held up or fail."""

    def __init__(self, hook: Callable[[int], None] = lambda position: None) -> None:
        self.hook = hook
        self.reads: list[tuple[int, int]] = []
        self.threads: set[str] = set()

    def read(self, position: int, count: int) -> Batch:
        self.reads.append((position, count))
        self.threads.add(threading.current_thread().name)
        self.hook(position)
        rows = torch.arange(position, position + count, dtype=torch.float16)[:, None]
        return Batch(rows, [[str(n)] for n in range(position, position + count)])

    def batch(self, position: int, count: int) -> Batch:
        return self.read(position, count).to(CPU)


class Memory:
    """The same samples without `read`."""

    def batch(self, position: int, count: int) -> Batch:
        assert threading.current_thread() is threading.main_thread()
        return Disk().batch(position, count)


class Counting(Memory):
    """Notes the positions of the batches that it makes."""

    def __init__(self) -> None:
        self.made: list[int] = []

    def batch(self, position: int, count: int) -> Batch:
        self.made.append(position)
        return super().batch(position, count)


def running() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "aad1-reader"]


def test_batches_are_those_that_are_asked_for_and_each_is_read_once() -> None:
    disk = Disk()
    with Reader(disk, CPU, 2) as reader:
        for n in range(0, 12, 2):
            batch = reader.batch(n, 2, count(n + 2, 2))
            assert batch.latents.dtype == torch.float32
            assert batch.latents.flatten().tolist() == [n, n + 1]
            assert batch.captions == [[str(n)], [str(n + 1)]]
        while len(disk.reads) < 8:  # two more are under way
            time.sleep(0.001)
    assert disk.reads == [(n, 2) for n in range(0, 16, 2)]
    assert disk.threads == {"aad1-reader"} and not running()


def test_a_jump_drops_what_was_read_for_other_positions() -> None:
    with Reader(Disk(), CPU, 2) as reader:
        reader.batch(0, 2, count(2, 2))
        for position, size in ((100, 2), (102, 2), (104, 3), (2, 2), (8, 2)):
            batch = reader.batch(position, size, count(position + size, size))
            assert batch.latents.flatten().tolist() == list(range(position, position + size))


@pytest.mark.parametrize("source,depth", [(Disk(), 0), (Memory(), 2)])
def test_without_depth_or_files_there_is_no_thread(source: Any, depth: int) -> None:
    with Reader(source, CPU, depth) as reader:
        assert reader.batch(4, 2, count(6, 2)).latents.flatten().tolist() == [4, 5]
        assert not running()


def test_an_announced_batch_is_made_at_once_and_only_if_it_is_not_on_a_disk() -> None:
    source, disk = Counting(), Disk()
    with Reader(source, CPU) as reader:
        reader.announce(4, 2)
        assert source.made == [4]
        assert torch.equal(reader.batch(4, 2).latents, Memory().batch(4, 2).latents)
        assert source.made == [4]
        reader.announce(6, 2)
        for position in (8, 6):  # not what was announced, and what was announced before that
            got = reader.batch(position, 2).latents
            assert torch.equal(got, Memory().batch(position, 2).latents)
        assert source.made == [4, 6, 8, 6]
    for depth in (0, 2):
        with Reader(disk, CPU, depth) as reader:
            reader.announce(0, 2)
    assert not disk.reads


def test_a_batch_is_read_while_the_one_before_is_computed() -> None:
    """The computation waits for the reads to have begun: without reading ahead, in vain."""
    begun = {n: threading.Event() for n in range(5)}
    with Reader(Disk(lambda n: begun[n].set()), CPU, 1) as reader:
        for n in range(4):
            reader.batch(n, 1, count(n + 1))
            assert begun[n + 1].wait(10), n


@pytest.mark.parametrize("depth", [0, 2])
def test_a_slow_disk_is_hidden(depth: int) -> None:
    """Six reads of 0.1 s beside computations of 0.15 s: only the first one is waited for."""
    with Reader(Disk(lambda n: time.sleep(0.1)), CPU, depth) as reader:
        for n in range(6):
            reader.batch(n, 1, count(n + 1))
            time.sleep(0.15)
    assert reader.waited >= 0.6 if depth == 0 else 0.1 <= reader.waited < 0.35


def test_an_error_of_the_thread_comes_with_the_batch_that_it_is_of() -> None:
    def fail(position: int) -> None:
        if position == 2:
            raise UserError("clip 7 in data/shard-00003.safetensors: Input/output error")

    with Reader(Disk(fail), CPU, 2) as reader:
        assert reader.batch(0, 1, count(1)).captions == [["0"]]  # by now 2 is being read
        assert reader.batch(1, 1, count(2)).captions == [["1"]]
        with pytest.raises(UserError, match=r"clip 7 in data/shard-00003\.safetensors"):
            reader.batch(2, 1, count(3))
    assert not running()


def test_a_read_that_hangs_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "PATIENCE", 0.05)
    gone = threading.Event()
    try:
        with pytest.raises(KeyError), Reader(Disk(lambda n: n > 0 and gone.wait(60)), CPU) as r:
            r.batch(0, 1, count(1))
            raise KeyError("something else ends the run")
        (left,) = running()
        assert left.daemon  # the program ends all the same
    finally:
        gone.set()
    left.join(10)


class Cuda:
    """Stands in for torch.cuda: notes what is asked of streams, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, pins: bool = True) -> None:
        self.said: list[str] = []
        said = self.said

        class Stream:
            def __init__(self, name: Any) -> None:
                self.name = "side" if name == CPU else str(name)

            def record_event(self) -> str:
                said.append(f"{self.name} records")
                return "event"

            def wait_event(self, event: str) -> None:
                said.append(f"{self.name} waits")

        def pin(tensor: torch.Tensor) -> torch.Tensor:
            if not pins:
                raise RuntimeError("CUDA error: out of memory\nand more")
            said.append("pin")
            return tensor.clone()

        to = torch.Tensor.to

        def copy(tensor: torch.Tensor, *args: Any, non_blocking: bool = False) -> torch.Tensor:
            said.append(f"copy {non_blocking}")
            return to(tensor, *args)

        def record(tensor: torch.Tensor, stream: Stream) -> None:
            said.append(f"{list(tensor.shape)} for {stream.name}")

        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext(said.append("on")))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("main"))
        monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
        monkeypatch.setattr(torch.Tensor, "to", copy)
        monkeypatch.setattr(torch.Tensor, "record_stream", record)

    def copies(self) -> Any:
        made = reader_module._Copies(CPU)
        made._stream = torch.cuda.Stream(CPU)
        return made


def test_copies_go_through_pinned_memory_and_are_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = Cuda(monkeypatch)
    copies = cuda.copies()
    states = torch.arange(12, dtype=torch.float16).view(2, 3, 2)
    ready = copies.send(Batch(states[:, -1], [["a"], ["b"]], states))
    assert cuda.said == ["on", "pin", "copy True", "side records"]
    batch = copies.receive(ready)
    assert cuda.said[4:] == ["main waits", "[2, 2] for main", "[2, 3, 2] for main"]
    assert batch.trajectory.dtype == torch.float32 and batch.captions == [["a"], ["b"]]
    assert torch.equal(batch.trajectory, states.float())
    assert torch.equal(batch.latents, states[:, -1].float())


def test_without_pinned_memory_it_warns_once_and_copies_all_the_same(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    cuda = Cuda(monkeypatch, pins=False)
    copies = cuda.copies()
    for n in range(3):
        batch = copies.receive(copies.send(Disk().read(n, 1)))
        assert batch.latents.flatten().tolist() == [n]
    assert [str(w.message) for w in recwarn] == [
        "no page-locked memory for batches: CUDA error: out of memory"
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_batches_are_whole_while_the_device_is_busy() -> None:
    device = torch.device("cuda", 0)

    class Large(Disk):
        def read(self, position: int, count: int) -> Batch:
            rows = super().read(position, count).latents
            return Batch(rows.expand(-1, 4_000_000).contiguous(), [["a"]] * count)

    work = torch.randn(4096, 4096, device=device)
    with Reader(Large(), device, 2) as reader:
        for n in range(0, 60, 2):
            batch = reader.batch(n, 2, count(n + 2, 2))
            low, high = batch.latents.aminmax(dim=1)
            work = torch.tanh(work @ work)  # the batch's memory is free before this is done
            del batch
            assert low.tolist() == high.tolist() == [n, n + 1]


# -- in the loop ----------------------------------------------------------------------------------


class Stage:
    """A linear map of sample and noise, judged by another; notes the samples of each step."""

    critic_updates = 2

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net, self.critic = nn.Linear(1, 2), nn.Linear(2, 1)
        self.seen: list[tuple[str, list[float]]] = []

    def trained(self) -> dict[str, list[nn.Parameter]]:
        return {"generator": list(self.net.parameters()), "critic": list(self.critic.parameters())}

    def _loss(self, batch: Batch, rng: Rng, role: str) -> Loss:
        self.seen.append((role, batch.latents.flatten().tolist()))
        x = batch.latents / 100
        loss = (self.critic(self.net(x + randn(x.shape, x, rng))) ** 2).mean()
        logs: Logs = {"loss": loss.detach()}
        return loss, logs

    def generator_loss(self, batch: Batch, rng: Rng) -> Loss:
        return self._loss(batch, rng, "generator")

    def critic_loss(self, batch: Batch, rng: Rng) -> Loss:
        return self._loss(batch, rng, "critic")


def trainer(source: Any, prefetch: int, processes: Processes | None = None) -> Trainer:
    stage = Stage()
    optim = OptimConfig(updates=5, batch=4, accumulate=3, lr=0.01)
    return Trainer(
        stage, source, {"generator": stage.net, "critic": stage.critic}, ("generator",), optim,
        seed=3, device=CPU, bf16=False, critic_warmup=1, prefetch=prefetch, processes=processes,
    )  # fmt: skip


def outcome(run: Trainer) -> list[torch.Tensor]:
    return [p for module in run.modules.values() for p in module.parameters()]


def test_what_is_announced_is_what_is_asked_for_next() -> None:
    source = Counting()
    ahead, plain = trainer(source, 2), trainer(Memory(), 2)
    ahead.announces = True  # as on CUDA
    for run in (ahead, plain):
        with run.reader:
            for _ in range(3):
                run.step()
    assert isinstance(ahead.stage, Stage) and isinstance(plain.stage, Stage)
    assert ahead.stage.seen == plain.stage.seen
    assert all(torch.equal(a, b) for a, b in zip(outcome(ahead), outcome(plain), strict=True))
    assert source.made == list(range(0, 4 * (3 * (3 * 3 + 1) + 1), 4))  # each once, and one more
    assert ahead.reader.waited > 0


def test_a_run_is_the_same_with_and_without_and_resumed_at_every_step() -> None:
    plain = trainer(Disk(), 0)
    disk = Disk()
    ahead = trainer(disk, 2)
    for run in (plain, ahead):
        with run.reader:
            for _ in range(3):
                run.step()
    assert isinstance(plain.stage, Stage) and isinstance(ahead.stage, Stage)
    assert plain.stage.seen == ahead.stage.seen and len(plain.stage.seen) == 3 * (3 * 3 + 1)
    assert plain.counters() == ahead.counters()
    assert disk.reads[:30] == [(n, 4) for n in range(0, 120, 4)] and len(disk.reads) <= 32
    for stop in range(1, 10):
        part, rest = trainer(Disk(), 2), trainer(Disk(), 2)
        asked = iter([False] * stop + [True])
        with part.reader:
            while part.step(lambda asked=asked: next(asked)) is not None:  # type: ignore[misc]
                pass
        saved = {n: t.clone() for n, t in part.tensors().items()}
        with rest.reader:
            rest.reader.batch(0, 4, count(4, 4))  # what was read before is not used
            rest.restore(
                part.counters(), {n: tuple(t.shape) for n, t in saved.items()},
                lambda into, saved=saved: [t.copy_(saved[n]) for n, t in into.items()],
            )  # fmt: skip
            while rest.update < 3:
                rest.step()
        assert isinstance(part.stage, Stage) and isinstance(rest.stage, Stage)
        assert part.stage.seen + rest.stage.seen == plain.stage.seen, stop
        assert all(map(torch.equal, outcome(rest), outcome(plain))), stop
    assert all(map(torch.equal, outcome(ahead), outcome(plain)))
    assert not running()


def test_each_group_of_processes_reads_its_own_clips_ahead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """12 clips an update, 6 for each of two groups, 3 at a time; no clip is read by both."""
    monkeypatch.setattr("aad1.train.loop.distribute", lambda module, processes: None)
    monkeypatch.setattr(Processes, "mean", lambda self, values: values)
    found = []
    for rank in range(2):
        disk = Disk()
        run = trainer(disk, 2, Processes(rank, 2, MeshShape(dp=2)))
        assert (run.samples, run.micro) == (6, 3)
        with run.reader:
            for _ in range(2):
                run.step()
        used = [(n, 3) for start in range(0, 84, 12) for n in (start, start + 3)]
        assert disk.reads[:14] == [(n + 6 * rank, size) for n, size in used]
        assert len(disk.reads) <= 16
        found += [n + i for n, size in disk.reads[:14] for i in range(size)]
    assert sorted(found) == list(range(84))


def test_throughput_counts_training_steps_and_the_longest_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = trainer(Disk(), 0)
    speed = Throughput(run, Processes())
    assert speed.take() == {} and speed.summary() == ""
    clock = iter([10.0, 14.0, 100.0, 102.0])
    monkeypatch.setattr("aad1.train.throughput.time.monotonic", lambda: next(clock))
    monkeypatch.setattr(Processes, "gather", lambda self, value: [value, value + 0.5])
    with speed.step():
        run.position, run.reader.waited = 24, 0.25
    assert speed.take() == {"clips_per_s": 6.0, "data_wait_s": 0.75}
    with speed.step():
        run.position, run.reader.waited = 36, 1.25
    assert speed.summary() == "; 6 clips/s, of 6 s in training steps 2.2 s waited for data"
