"""The benchmarks compare what they say: equal networks, measured in turn. Times themselves are never tested."""

import json
import time
from pathlib import Path

import pytest
import torch

from benchmarks import clocks, gpu, networks
from benchmarks import run as bench
from kit.errors import UserError


def test_both_networks_give_the_same() -> None:
    pytest.importorskip("diffusers")
    ours, theirs = networks.same_network(networks.Size(64), torch.device("cpu"))
    a, b = ours.forward(), theirs.forward()
    assert float((a - b).norm() / b.norm()) < 1e-5
    ours.use(True, True)  # another setting rounds, and is the same network
    c = ours.forward().float()
    assert 0 < float((c - b).norm() / b.norm()) < 0.05


def test_both_train_the_temporal_layers_alone() -> None:
    pytest.importorskip("diffusers")
    trained = []
    for one in networks.same_network(networks.Size(64), torch.device("cpu")):
        before = {name: p.clone() for name, p in one.net.named_parameters()}
        one.step(True)()
        changed = [name for name, p in one.net.named_parameters() if not torch.equal(p, before[name])]
        assert changed and all(one.temporal(name) for name in changed)
        trained.append(sum(p.numel() for p in one.net.parameters() if p.requires_grad))
    assert trained[0] == trained[1]


def test_ours_and_theirs_run_in_turn() -> None:
    calls: list[str] = []
    clock = clocks.Clock(torch.device("cpu"), 3, 64)
    found = clock.in_turn(lambda: calls.append("ours"), lambda: calls.append("theirs"))
    assert calls == ["ours", "theirs"] * 4
    assert len(found["ours"]) == 3 and found["ratio, lowest"] <= found["ratio"] <= found["ratio, highest"]


def test_the_nearest_size_is_chosen() -> None:
    net = networks.nearest_size(lambda width: torch.nn.Linear(width, width, bias=False), 10_000, range(10, 300, 10))
    assert net.in_features == 100


def test_a_table_says_what_was_compared() -> None:
    machine = {"cpu": "A", "instructions": [], "threads": 2, "versions": {"torch": "2"},
               "matrix rate, GFLOP/s": {"float32": 1.0, "bfloat16": 2.0}}
    row = {"row": "forward", "against": "B", "ours": [1.0, 2.0, 3.0], "theirs": [4.0, 4.0, 4.0], "ratio": 2.0,
           "ratio, lowest": 1.5, "ratio, highest": 2.5, "share, ours": 0.25}
    text = bench.table({"hardware": machine, "rows": [row]})
    assert "| forward | B | 2 | 4 | 2.00 (1.50 to 2.50) | 25 % |" in text


def test_the_part_for_a_gpu_runs_on_a_cpu_at_small_size() -> None:
    pytest.importorskip("diffusers")
    clock = clocks.Clock(torch.device("cpu"), 1, 64)
    size = networks.Size(64, (1, 1), tokens=3, clips=1, latent=(4, 8))
    formats = {"compiled": (False, False, True, False, "aot_eager")}  # the graph is found, and run without a compiler
    rows = list(bench.large_rows(clock, ["diffusers"], size, formats))
    assert [row["row"].split(", ")[-1] for row in rows] == [
        "SD 2.1 size", "SD 2.1 size", "without gradient checkpointing", "with gradient checkpointing"]
    assert rows[0]["setting, ours"] == "compiled" and rows[0]["FLOPs, ours"] > 1e8
    assert "large" in bench.tables({}) and "not measured" in bench.tables({})


def test_steps_are_timed_from_asking_to_asking_for_clips() -> None:
    class Slow:
        def clips(self, key: tuple, count: int) -> int:
            time.sleep(0.02)
            return count

    watch = clocks.Stopwatch(Slow(), 1, clocks.Clock(torch.device("cpu"), 1, 64))
    for step in range(4):
        assert watch.clips((0, 6, step), 2) == watch.clips((0, 6, step), 2)  # lesson 6 asks twice a step
        time.sleep(0.04)
    found = watch.numbers()
    assert len(found["ours"]) == 2 and min(found["ours"]) >= 0.08 and 0.2 < found["waiting for clips"] < 0.8
    assert "waiting for clips" in bench.shares(found)


def test_kernels_are_counted_by_kind() -> None:
    names = [("cudnn::nchwToNhwcKernel", 1.0), ("sm90_xmma_fprop_implicit_gemm_bf16", 4.0), ("nvjet_tst_128x256", 2.0),
             ("pytorch_flash::flash_fwd_kernel", 0.5), ("vectorized_elementwise_kernel<bf16 silu>", 3.0), ("x", 0.1)]
    assert clocks.kernel_times(names) == {"convolutions": 4.0, "elementwise": 3.0, "matrix products": 2.0,
                                          "copies": 1.0, "attention": 0.5, "other": 0.1}


def test_a_width_without_whole_heads_is_refused() -> None:
    with pytest.raises(UserError, match="multiples of 64"):
        bench.main(["--widths", "100"])


def test_growth_is_a_power_law_of_each_size(tmp_path: Path) -> None:
    assert bench.exponent((2, 4, 8), (1.0, 3.0, 16.0)) == pytest.approx(2)
    rows = [{"axis": axis, "size": size, "ours": [size**2.0]} for axis, (sizes, *_) in bench.GROWTH.items()
            for size in sizes]
    bench.growth_figure(rows, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 1000
    clock = clocks.Clock(torch.device("cpu"), 1, 64)
    assert min(bench.steps_of_size(clock, frames=2, pixels=32)) > 0


def test_the_minutes_on_a_gpu_are_rehearsed(tmp_path: Path) -> None:
    gpu.main(["--tiny", "--minutes", "15", "--out", str(tmp_path)])
    first = json.loads((tmp_path / "gpu.json").read_text())
    assert {name: job["exit code"] for name, job in first.items()} == dict.fromkeys(
        ("tests", "lessons", "large", "training", "weights 02", "weights 03", "weights 05", "weights 05, last steps",
         "weights 06", "weights 06, last steps", "compiled", "tables"), 0)
    assert {job["part"] for job in first.values()} == set(gpu.PARTS)
    first["training"]["exit code"] = -15  # as if it had been stopped
    (tmp_path / "gpu.json").write_text(json.dumps(first))
    gpu.main(["--tiny", "--minutes", "15", "--out", str(tmp_path)])
    second = json.loads((tmp_path / "gpu.json").read_text())
    assert second["training"]["exit code"] == 0 and second["weights 06"] == first["weights 06"]


def test_a_job_at_its_limit_is_stopped(tmp_path: Path) -> None:
    found = gpu.do(gpu.Job("fast", "sleep", ["sleep", "60"], 1), 1, tmp_path / "log")
    assert found["exit code"] == -15 and found["seconds"] < 20
