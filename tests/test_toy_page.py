"""docs/toy.html: its functions under Node give what lesson 1 gives."""

import json
import re
import shutil
import subprocess
from importlib import import_module
from pathlib import Path

import pytest
import torch

from common.diffusion import Diffusion

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "toy.html").read_text()
toy = import_module("01_toy_alignment")
pytestmark = pytest.mark.skipif(not shutil.which("node"), reason="needs Node")


def run(tmp_path: Path, program: str) -> object:
    (tmp_path / "toy.js").write_text(re.search(r"<script>(.*)</script>", PAGE, re.S)[1])
    (tmp_path / "main.js").write_text('const t = require("./toy.js");\n' + program)
    done = subprocess.run(["node", tmp_path / "main.js"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_exact_score_is_that_of_lesson_1(tmp_path: Path) -> None:
    diffusion, draw = Diffusion("sqrt_linear", 0.0015, 0.0195, "v"), torch.Generator().manual_seed(0)
    x, taus = 2 * torch.randn(5, toy.FRAMES, generator=draw), [3, 100, 400, 800, 999]
    program = f"""const clip = t.eigen({toy.FRAMES}, {toy.CORRELATION}), x = {x.tolist()}, taus = {taus};
    console.log(JSON.stringify({{ levels: taus.map(tau => [t.ALPHA[tau], t.SIGMA[tau]]),
      clips: x.map((one, i) => t.exactV(one, taus[i], clip)),
      images: x.map((one, i) => one.map(value => t.exactV([value], taus[i], t.IMAGE)[0])) }}))"""
    found, tau = run(tmp_path, program), torch.tensor(taus)
    exact = toy.exact_v(diffusion)
    levels = torch.stack([diffusion.alpha[tau], diffusion.sigma[tau]], dim=1)
    torch.testing.assert_close(torch.tensor(found["levels"]), levels, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.tensor(found["clips"]), exact(x, tau), rtol=1e-3, atol=1e-3)
    alone = exact(x.reshape(-1, 1), tau.repeat_interleave(toy.FRAMES)).view_as(x)
    torch.testing.assert_close(torch.tensor(found["images"]), alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("alpha", [0, 1])
def test_the_same_noise_ends_where_lesson_1_ends(tmp_path: Path, alpha: int) -> None:
    """eta 1 with no fresh noise drawn, 40 steps; alpha 0 is the score of clips, alpha 1 that of single images."""
    diffusion = Diffusion("sqrt_linear", 0.0015, 0.0195, "v")
    noise, exact = torch.randn(4, toy.FRAMES, generator=torch.Generator().manual_seed(1)), toy.exact_v(diffusion)
    program = f"""const clip = t.eigen({toy.FRAMES}, {toy.CORRELATION});
    const options = {{ alpha: {alpha}, clip, label: -1, scale: 1, steps: 40, eta: 1 }};
    console.log(JSON.stringify({{ times: t.samplingTimes(40),
      ends: {noise.tolist()}.map(one => t.sample(one, options, () => 0).path.at(-1)) }}))"""
    found = run(tmp_path, program)

    def predict(x: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
        return exact(x.reshape(-1, 1), tau.repeat_interleave(toy.FRAMES)).view_as(x) if alpha else exact(x, tau)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn", lambda shape, generator=None: torch.zeros(shape))
        ends, _ = toy.sample(predict, diffusion, noise, 40, torch.Generator())
    assert found["times"] == toy.sampling_times(diffusion, 40)
    torch.testing.assert_close(torch.tensor(found["ends"]), ends, rtol=2e-3, atol=2e-3)


def test_the_page_needs_no_network() -> None:
    assert not re.search(r"https?://|src=|@import|url\(", PAGE)
