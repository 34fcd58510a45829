"""The wheel works on its own: no checkout, nothing installed but what it declares to need."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from importlib.metadata import Distribution, distribution
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from PIL import Image

from aad1.media.images import read_image
from aad1.media.reading import probe_video, read_video
from aad1.model_info import read_info
from aad1.model_names import packaged_models
from aad1.models.codec import load_codec

ROOT = Path(__file__).parents[2]
PACKAGED = ROOT / "src" / "aad1" / "packaged"
MAX_PACKAGED = 32 * 2**20  # bytes of all packaged models together
CHUNKS = 3

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name != "posix", reason="links packages by symbolic links"),
]


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command that sees nothing of the checkout."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "COV_"))}
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, env=clean, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that no build folder of an earlier day gets in."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    leave_out = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "src", source / "src", ignore=leave_out)
    offline = ("--no-build-isolation", "--no-deps", "--no-index")
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", *offline)
    built = run(*pip, "--wheel-dir", folder, source, cwd=folder)
    assert built.returncode == 0, built.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel and links to the packages that it asks for.

    Links, since a download of torch would take longer than all other tests together. What only
    the development tools or the extras bring along is not there.
    """
    folder = tmp_path_factory.mktemp("environment") / "env"
    venv.create(folder, with_pip=False, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    pip = (sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install")
    installed = run(*pip, "--quiet", "--no-deps", "--no-index", wheel, cwd=folder)
    assert installed.returncode == 0, installed.stderr
    (metadata,) = packages.glob("aad1-*.dist-info")
    for needed in needs(Distribution.at(metadata), frozenset(), set()):
        for top in {file.parts[0] for file in needed.files or ()} - {"..", "__pycache__"}:
            link = packages / top
            if not link.exists():
                link.symlink_to(Path(str(needed.locate_file(top))))
    return folder


def needs(
    package: Distribution, extras: frozenset[str], seen: set[tuple[str, str]]
) -> Iterator[Distribution]:
    """Every distribution that a package requires here, directly or not."""
    for line in package.requires or ():
        wanted = Requirement(line)
        for extra in extras | {""}:
            key = wanted.name, extra + str(sorted(wanted.extras))
            if key in seen or not (
                wanted.marker is None or wanted.marker.evaluate({"extra": extra})
            ):
                continue
            seen.add(key)
            found = distribution(wanted.name)
            yield found
            yield from needs(found, frozenset(wanted.extras), seen)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A photograph-like picture of another size and aspect than any model's."""
    y, x = np.mgrid[:180, :320] / 180
    waves = np.stack([np.sin(3 * x + y), np.cos(2 * y), np.sin(5 * x * y)], axis=-1)
    path = tmp_path_factory.mktemp("image") / "picture.png"
    Image.fromarray((127.5 + 100 * waves).astype(np.uint8)).save(path)
    return path


def test_the_wheel_holds_what_it_should(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        sizes = {item.filename: item.file_size for item in archive.infolist()}
    names = set(sizes)
    assert {"aad1/__init__.py", "aad1/cli.py", "aad1/py.typed"} <= names
    info = next(name.split("/")[0] for name in names if ".dist-info/" in name)
    assert {f"{info}/licenses/LICENSE", f"{info}/licenses/NOTICE"} <= names
    sources = {p.relative_to(ROOT / "src").as_posix() for p in (ROOT / "src").rglob("*.py")}
    assert sources <= names
    packaged = {p.relative_to(ROOT / "src").as_posix() for p in PACKAGED.rglob("*") if p.is_file()}
    assert packaged, f"no model in {PACKAGED}"
    assert packaged <= names
    assert {name.split("/")[0] for name in names} == {"aad1", info}
    assert sum(size for name, size in sizes.items() if name in packaged) <= MAX_PACKAGED


def test_the_environment_is_not_the_checkout(environment: Path, tmp_path: Path) -> None:
    where = run(
        environment / "bin" / "python",
        "-c",
        "import aad1, importlib.util as u; print(aad1.__file__);"
        "print([n for n in ('pytest', 'ruff', 'diffusers', 'vizdoom') if u.find_spec(n)])",
        cwd=tmp_path,
    )
    assert where.returncode == 0, where.stderr
    assert where.stdout.splitlines()[0].startswith(str(environment))
    assert where.stdout.splitlines()[1] == "[]"


@pytest.mark.parametrize("model", packaged_models() or ["sprites"])
def test_it_generates_from_the_packaged_model(
    environment: Path, tmp_path: Path, model: str
) -> None:
    image = PACKAGED / f"{model}_frames" / "00.png"  # a codec knows its own world's pictures only
    made = run(
        environment / "bin" / "aad1",
        *("generate", "--model", model, "--image", image, "--prompt", ""),
        *("--chunks", str(CHUNKS), "--out", "new/x.mp4"),
        cwd=tmp_path,
    )
    assert made.returncode == 0, made.stderr
    info = read_info(PACKAGED / model)
    stride = load_codec(PACKAGED / model / "codec").temporal_stride
    video = tmp_path / "new" / "x.mp4"
    found = probe_video(video)
    assert found.frames == 1 + CHUNKS * info.geometry.chunk * stride
    assert found.fps == pytest.approx(info.fps, rel=1e-3)
    assert [p.name for p in video.parent.iterdir()] == ["x.mp4"]
    size = {"width": info.width, "height": info.height}
    frames = read_video(video, **size).float()
    first = read_image(image, **size).float()
    assert (frames[0] - first).abs().mean() < 8, "the first frame is not the given image"
    assert (frames[1:] - frames[:-1]).abs().mean() > 0.05, "nothing moves"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--model": "sprits"}, r"did you mean 'sprites'"),
        ({"--image": "nowhere.png"}, r"nowhere\.png does not exist"),
        ({"--out": "x.avi"}, r"x\.avi must end in one of \.mp4, \.gif, \.png"),
    ],
)
def test_a_mistake_gives_one_line_and_no_file(
    environment: Path, image: Path, tmp_path: Path, change: dict[str, str], message: str
) -> None:
    options = {"--model": "sprites", "--image": str(image), "--chunks": "1", "--out": "x.mp4"}
    words = [word for pair in (options | change).items() for word in pair]
    made = run(environment / "bin" / "aad1", "generate", *words, cwd=tmp_path)
    assert made.returncode == 2, made.stderr
    assert len(made.stderr.strip().splitlines()) == 1
    assert re.search(message, made.stderr)
    assert list(tmp_path.iterdir()) == []
