"""Self-Forcing's ODE databases, written here with the lmdb package as public code writes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from aad1.data.shards import ClipShards
from aad1.errors import UserError
from aad1.train.lmdb_import import OdeLmdb, import_lmdb

lmdb = pytest.importorskip("lmdb")


def database(folder: Path, latents: np.ndarray, prompts: list[str]) -> Path:
    """Rows under name_index_data, shapes as text, in one database."""
    folder.mkdir(parents=True)
    with lmdb.open(str(folder), map_size=1 << 24) as env, env.begin(write=True) as txn:
        for name, rows in (("latents", latents), ("prompts", np.array(prompts))):
            txn.put(f"{name}_shape".encode(), " ".join(map(str, rows.shape)).encode())
            for i, row in enumerate(rows):
                value = row.encode() if isinstance(row, str) else row.tobytes()
                txn.put(f"{name}_{i}_data".encode(), value)
    return folder


def latents(count: int, seed: int = 0) -> np.ndarray:
    """[N, 5, 3, 2, 4, 6]: four states and the end point, frames before channels."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, 5, 3, 2, 4, 6)).astype(np.float16)


def test_states_come_out_channels_first_at_the_student_s_levels(tmp_path: Path) -> None:
    rows = latents(5)
    prompts = [f"prompt {i} é" for i in range(5)]
    source = database(tmp_path / "in", rows, prompts)
    assert OdeLmdb(source).prompts() == prompts
    assert OdeLmdb(source).sigmas(5.0) == pytest.approx([1, 0.9375, 0.83333, 0.625], abs=1e-5)
    import_lmdb(source, tmp_path / "out", sigmas=(1.0, 0.8333333333333334), shift=5.0, batch=2)
    shards = ClipShards(tmp_path / "out")
    assert shards.tensor == "states" and len(shards) == 5
    assert shards.captions == [[p] for p in prompts]
    want = torch.from_numpy(rows[:, [0, 2, 4]]).transpose(2, 3)
    assert torch.equal(shards.read_tensors(), want)
    assert shards.manifest["config"]["sigmas"] == [1.0, 0.8333333333333334]


def test_an_interrupted_import_goes_on(tmp_path: Path) -> None:
    source = database(tmp_path / "in", latents(4), list("abcd"))
    import_lmdb(source, tmp_path / "out", sigmas=(1.0,), shift=5.0, batch=2)
    kept = (tmp_path / "out" / "shard-00000.safetensors").stat().st_mtime_ns
    (tmp_path / "out" / "shard-00001.safetensors").unlink()
    import_lmdb(source, tmp_path / "out", sigmas=(1.0,), shift=5.0, batch=2)
    assert (tmp_path / "out" / "shard-00000.safetensors").stat().st_mtime_ns == kept
    assert ClipShards(tmp_path / "out").captions == [["a"], ["b"], ["c"], ["d"]]
    with pytest.raises(UserError, match="was begun with batch 2, now it is 3"):
        import_lmdb(source, tmp_path / "out", sigmas=(1.0,), shift=5.0, batch=3)


def test_several_databases_are_one(tmp_path: Path) -> None:
    one, two = latents(2, 1), latents(3, 2)
    database(tmp_path / "in" / "0", one, ["a", "b"])
    database(tmp_path / "in" / "1", two, ["c", "d", "e"])
    import_lmdb(tmp_path / "in", tmp_path / "out", sigmas=(1.0,), shift=8.0, batch=4)
    shards = ClipShards(tmp_path / "out")
    assert shards.captions == [["a"], ["b"], ["c"], ["d"], ["e"]]
    want = torch.from_numpy(np.concatenate([one, two])[:, [0, 4]]).transpose(2, 3)
    assert torch.equal(shards.read_tensors(), want)


def test_a_level_that_is_not_stored_is_refused(tmp_path: Path) -> None:
    """With Self-Forcing's own shift of 8 the two-step level of shift 5 is not in the file."""
    source = database(tmp_path / "in", latents(1), ["a"])
    with pytest.raises(UserError, match=r"no state at sigma 0\.8333.*1\.0000, 0\.9600, 0\.8889"):
        import_lmdb(source, tmp_path / "out", sigmas=(1.0, 5 / 6), shift=8.0)
    assert not (tmp_path / "out").exists()


def test_what_is_no_such_database_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no LMDB: no data\.mdb"):
        OdeLmdb(tmp_path)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "data.mdb").write_text("hello")
    with pytest.raises(UserError, match="cannot be read as LMDB"):
        OdeLmdb(tmp_path / "text")
    other = database(tmp_path / "other", np.zeros((2, 3)), ["a", "b"])
    with pytest.raises(UserError, match="latents_shape must be N, n"):
        OdeLmdb(other)
    wrong = database(tmp_path / "wrong", latents(1).astype(np.float32), ["a"])
    with pytest.raises(UserError, match="latents_0_data has 2880 bytes, 1440 fit"):
        import_lmdb(wrong, tmp_path / "out", sigmas=(1.0,), shift=5.0)
    with lmdb.open(str(wrong), map_size=1 << 24) as env, env.begin(write=True) as txn:
        txn.delete(b"prompts_0_data")
    with pytest.raises(UserError, match="has no key prompts_0_data"):
        OdeLmdb(wrong).prompts()
