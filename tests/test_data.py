"""kit/data.py: frames by time stamp, crops, splits, labels, and notes on clips that cannot serve."""

import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from extra.latents import with_latents
from kit import data
from kit.data import Recording, VideoFolder, open_data, usual_rate
from kit.errors import UserError
from kit.flags import preset_config
from kit.run import Run


@pytest.fixture(autouse=True)
def notes_anew():
    data.note.cache_clear()


def grey(i: int, height: int = 32, width: int = 64) -> np.ndarray:
    """A frame whose index can be read from its colour."""
    return np.full((height, width, 3), 4 * i, np.uint8)


def index(video: torch.Tensor) -> list:
    """The indices of grey frames: b t c h w -> b lists of t."""
    return (((video + 1) * 127.5).mean((2, 3, 4)) / 4).round().int().tolist()


def write_video(path, count: int, fps: int = 25, **options) -> None:
    av = pytest.importorskip("av")
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        stream.options = {"crf": "2", "g": "10", "bf": "2"}
        for i in range(count):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey(i % 60), format="rgb24")))
        container.mux(stream.encode())


def write_frames(folder, count: int, fps: float | None = None, first: int = 0) -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        Image.fromarray(grey(first + i)).save(folder / f"{i}.png")
    if fps:
        (folder / "fps.txt").write_text(f"{fps}\n")


def five_clips(folder) -> None:
    """a to e, each of one colour, 20 frames at 10 fps; c has 4 frames only."""
    for number, name in enumerate("abcde"):
        count = 4 if name == "c" else 20
        write_frames(folder / name, count, 10)
        for i in range(count):
            Image.fromarray(grey(10 * (number + 1))).save(folder / name / f"{i}.png")


def test_driving_scenes():
    source = open_data("driving", 16, 32, 30.0)
    clips = source.clips((0, 7), 3, 4, 30 / 16)
    assert source.labelled and source.name == "driving"
    assert clips.video.shape == (3, 4, 3, 16, 32) and clips.video.dtype == torch.float32
    assert clips.video.min() >= -1 and clips.video.max() <= 1 and clips.video.std() > 0.1
    assert clips.boxes.shape == (3, 4, data.MAX_CARS, 4) and clips.boxes.dtype == torch.float32
    assert clips.night.dtype == clips.cars.dtype == torch.int64 and all(clips.captions)
    again, fewer = source.clips((0, 7), 3, 4, 30 / 16), source.clips((0, 7), 1, 4, 30 / 16)
    assert torch.equal(clips.video, again.video) and torch.equal(clips.boxes, again.boxes)
    assert torch.equal(clips.video[:1], fewer.video)
    for other in (source.clips((0, 8), 3, 4, 30 / 16), source.clips((0, 7), 3, 4, 30 / 16, "held-out")):
        assert not torch.equal(clips.video, other.video)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi"])
@pytest.mark.parametrize("memory", [data.MEMORY, 0])
def test_25_to_10_fps_by_time_stamp(tmp_path, monkeypatch, suffix, memory):
    monkeypatch.setattr(data, "MEMORY", memory)
    write_video(tmp_path / f"clip.{suffix}", 60)
    clips = open_data(str(tmp_path), 16, 32, 10.0).clips((0, 0), 6, 8, 10.0)
    for frames in index(clips.video):
        assert set(np.diff(frames)) == {2, 3} and frames[4] - frames[0] == frames[6] - frames[2] == 10


def test_memory_changes_nothing(tmp_path, monkeypatch):
    write_video(tmp_path / "clip.mp4", 60)
    kept = open_data(str(tmp_path), 16, 32, 25.0).clips((3, 1), 8, 5, 6.25).video
    monkeypatch.setattr(data, "MEMORY", 0)
    assert torch.equal(kept, open_data(str(tmp_path), 16, 32, 25.0).clips((3, 1), 8, 5, 6.25).video)


def test_uneven_gif(tmp_path):
    frames = [Image.fromarray(grey(i)) for i in range(6)]
    shown = [100, 300, 100, 100, 200, 100]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=shown)
    source = open_data(str(tmp_path), 16, 32, 5.0)
    recording = source.recordings[0]
    assert recording.times == pytest.approx([0, 0.1, 0.4, 0.5, 0.6, 0.8])
    picked = data.nearest(recording.times, np.array([0, 0.2, 0.3, 0.44, 0.46, 0.7, 0.9]))
    assert picked.tolist() == [0, 1, 2, 2, 3, 4, 5]
    assert index(source.clips((0,), 1, 5, 5.0).video) == [[0, 1, 2, 4, 5]]  # 0, 0.2, 0.4, 0.6, 0.8 s


def test_webp_and_png_animations(tmp_path):
    frames = [Image.fromarray(grey(i)) for i in range(5)]
    for suffix in ("webp", "png"):
        (tmp_path / suffix).mkdir()
        options = {"lossless": True} if suffix == "webp" else {}
        path = tmp_path / suffix / f"clip.{suffix}"
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=100, **options)
        source = open_data(str(tmp_path / suffix), 16, 32, 10.0)
        assert index(source.clips((0,), 1, 5, 10.0).video) == [[0, 1, 2, 3, 4]]


def test_numbered_frames(tmp_path):
    write_frames(tmp_path / "clip", 12, 5)  # 10.png comes behind 9.png
    source = open_data(str(tmp_path), 16, 32, 5.0)
    assert index(source.clips((0,), 1, 12, 5.0).video) == [list(range(12))]
    (tmp_path / "clip" / "fps.txt").unlink()
    assert open_data(str(tmp_path), 16, 32, 7.0).recordings[0].fps == pytest.approx(7.0)
    (tmp_path / "clip" / "fps.txt").write_text("12.5\n", "utf-16")  # `echo 12.5 > fps.txt` of Windows
    assert open_data(str(tmp_path), 16, 32, 8.0).recordings[0].fps == pytest.approx(12.5)
    (tmp_path / "clip" / "fps.txt").write_text("fast")
    with pytest.raises(UserError, match="clip .*fast"):
        open_data(str(tmp_path), 16, 32, 7.0)


def test_a_folder_that_is_itself_a_clip_of_numbered_frames(tmp_path):
    write_frames(tmp_path / "clip", 12, 5)
    (tmp_path / "clip" / "labels.csv").write_text("name,night,cars,caption\nclip,1,0,a road\n")
    source = open_data(str(tmp_path / "clip"), 16, 32, 5.0)
    clips = source.clips((0,), 1, 12, 5.0)
    assert index(clips.video) == [list(range(12))] and clips.captions == ["a road"] and clips.night.tolist() == [1]


@pytest.mark.parametrize("size", [(60, 40), (40, 60), (8, 8)])
def test_fills_and_crops_at_the_centre(tmp_path, size):
    """A disc on black stays a disc in the middle, whatever the shape of the picture."""
    (tmp_path / "clip").mkdir()
    x, y = np.meshgrid(np.arange(size[0]) - size[0] / 2 + 0.5, np.arange(size[1]) - size[1] / 2 + 0.5)
    disc = (255 * (x**2 + y**2 < (min(size) / 6) ** 2)).astype(np.uint8)
    Image.fromarray(disc).convert("RGB").save(tmp_path / "clip" / "0.png")
    video = open_data(str(tmp_path), 32, 64, 5.0).clips((0,), 1, 1, 5.0).video[0, 0, 0]
    bright = (video > 0).float()
    width, height = bright.amax(0).sum(), bright.amax(1).sum()
    assert abs(width - height) <= 2 and width > 8
    assert torch.allclose(video, video.flip(0), atol=0.05) and torch.allclose(video, video.flip(1), atol=0.05)


def test_damaged_clips_are_named_and_skipped(tmp_path, capsys):
    write_video(tmp_path / "good.mp4", 30)
    write_video(tmp_path / "begun.mp4", 30, movflags="faststart")  # readable up to the cut
    write_video(tmp_path / "cut.mp4", 30)  # its table of contents is lost
    for name in ("begun.mp4", "cut.mp4"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: int(len(content) * 0.8)])
    (tmp_path / "empty.mov").write_bytes(b"")
    source = open_data(str(tmp_path), 16, 32, 25.0)
    said = capsys.readouterr().err
    assert [r.path.name for r in source.recordings] == ["good.mp4"]
    assert "skipped 3 of 4" in said and "share" in said
    assert all(name in said for name in ("begun.mp4 (truncated)", "cut.mp4", "empty.mov"))
    assert "good.mp4" not in said


def test_damage_found_late(tmp_path):
    write_frames(tmp_path / "clip", 5, 5)
    (tmp_path / "clip" / "2.png").write_bytes((tmp_path / "clip" / "2.png").read_bytes()[:60])
    with pytest.raises(UserError, match="clip: cannot read the frame at 0.40 s"):
        open_data(str(tmp_path), 16, 32, 5.0).clips((0,), 1, 5, 5.0)


def test_no_folder_and_empty_folder(tmp_path):
    with pytest.raises(UserError, match="nowhere.*driving"):
        open_data(str(tmp_path / "nowhere"), 16, 32, 25.0)
    with pytest.raises(UserError, match="no clip; looked for"):
        open_data(str(tmp_path), 16, 32, 25.0)
    Image.fromarray(grey(1)).save(tmp_path / "still.png")
    with pytest.raises(UserError, match=r"still.png \(not animated\).*looked for"):
        open_data(str(tmp_path), 16, 32, 25.0)


@pytest.mark.parametrize(("rates", "usual"), [([(25, 60), (30, 50)], 25), ([(29.97, 10), (29.66, 10), (25, 15)], 30),
                                              ([(17.3, 5)], 17.3), ([], 30)])
def test_the_usual_rate_is_that_of_most_minutes(rates, usual):
    clips = [Recording(Path("x"), np.arange(round(seconds * fps)) / fps) for fps, seconds in rates]
    assert usual_rate([*clips, Recording(Path("picture.png"), np.zeros(1))]) == usual


def test_never_above_its_own_rate(tmp_path, capsys):
    write_frames(tmp_path / "slow", 30, 10)
    write_frames(tmp_path / "ntsc", 60, 29.97)
    source = open_data(str(tmp_path), 16, 32, 30.0)
    assert {row[3] - row[0] for row in index(source.clips((0,), 8, 4, 30.0).video)} == {3}  # all from ntsc
    assert "skipped 1 of 2 clips: slow has 10 fps, 30 are asked for" in capsys.readouterr().err
    source.clips((1,), 8, 4, 30.0)
    assert not capsys.readouterr().err  # said once
    with pytest.raises(UserError, match=r"--final-fps 29\.97"):
        open_data(str(tmp_path), 16, 32, 60.0).clips((0,), 1, 4, 60.0)


def test_too_short(tmp_path):
    write_frames(tmp_path / "clip", 20, 10)
    source = open_data(str(tmp_path), 16, 32, 10.0)
    source.clips((0,), 1, 20, 10.0)
    with pytest.raises(UserError, match=r"clip is 1.9 s long, 8 frames at 2.5 fps need 2.8 s\); use longer"):
        source.clips((0,), 1, 8, 2.5)


def test_a_held_out_clip_is_never_trained_on(tmp_path, capsys):
    five_clips(tmp_path)
    source = open_data(str(tmp_path), 16, 32, 10.0)
    for frames, fps in ((1, 10.0), (8, 10.0), (8, 5.0)):
        seen = {
            split: {i // 10 for row in index(source.clips((0,), 40, frames, fps, split).video) for i in row}
            for split in data.SPLITS
        }
        assert seen["held-out"] == {1}  # a, the first of the longest
        assert seen["train"] == ({2, 3, 4, 5} if frames == 1 else {2, 4, 5})
    said = capsys.readouterr().err
    assert "skipped 1 of 5 clips: c is 0.3 s long, 8 frames at 10 fps need 0.7 s" in said
    assert said.count("\n") == 3  # what the folder gives, and one line a request


def test_split_without_a_usable_clip(tmp_path, capsys):
    for name, count in (("a", 20), ("b", 3), ("c", 3)):
        write_frames(tmp_path / name, count, 10)
    source = open_data(str(tmp_path), 16, 32, 10.0)
    source.clips((0,), 1, 8, 10.0)
    said = capsys.readouterr().err
    assert "no train clip has 8 frames at 10 fps, so clips of the other split are used" in said


def test_clips_depend_on_the_key_alone(tmp_path):
    five_clips(tmp_path)
    write_frames(tmp_path / "moving", 20, 10)
    source = open_data(str(tmp_path), 16, 32, 10.0)
    first = source.clips((0, 5), 6, 4, 10.0).video
    source.clips((0, 6), 6, 4, 10.0)
    again = VideoFolder(tmp_path, 16, 32, 10.0)
    again.clips((9,), 1, 2, 10.0, "held-out")
    assert torch.equal(first, source.clips((0, 5), 6, 4, 10.0).video)
    assert torch.equal(first[:2], again.clips((0, 5), 2, 4, 10.0).video)
    assert not torch.equal(first, source.clips((0, 6), 6, 4, 10.0).video)


def test_labels_and_captions(tmp_path):
    for name in ("a", "b"):
        write_frames(tmp_path / name, 4, 10)
    (tmp_path / "b.txt").write_text("a road\n")
    source = open_data(str(tmp_path), 16, 32, 10.0)
    clips = source.clips((0,), 8, 4, 10.0)
    assert not source.labelled and set(clips.captions) == {"", "a road"} and (clips.night == -1).all()
    assert clips.boxes.shape == (8, 4, data.MAX_CARS, 4) and not clips.boxes.any()
    (tmp_path / "labels.csv").write_text('name,night,cars,caption\na,1,3,"dark, wet"\nb,0,0,\n')
    source = open_data(str(tmp_path), 16, 32, 10.0)
    clips = source.clips((0,), 8, 4, 10.0)
    rows = set(zip(clips.night.tolist(), clips.cars.tolist(), clips.captions, strict=True))
    assert source.labelled and rows == {(1, 3, "dark, wet"), (0, 0, "a road")}
    (tmp_path / "labels.csv").write_text("name,cars\na,3\nb,\n")
    assert not open_data(str(tmp_path), 16, 32, 10.0).labelled


@pytest.mark.parametrize(
    ("row", "complaint"),
    [("x,1,1,", "'x'"), ("a,2,1,", "night is '2'"), ("a,1,few,", "cars is 'few'"), ("a,1,1,dark, wet", "in quotes")],
)
def test_bad_labels(tmp_path, row, complaint):
    write_frames(tmp_path / "a", 4, 10)
    (tmp_path / "labels.csv").write_text(f"name,night,cars,caption\na,0,0,\n{row}\n")
    with pytest.raises(UserError, match=f"labels.csv, line 3: .*{complaint}"):
        open_data(str(tmp_path), 16, 32, 10.0)


def test_without_pyav(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "clip.mp4").write_bytes(b"")
    with pytest.raises(UserError, match=r"pip install av.*videoldm\[video\]"):
        open_data(str(tmp_path), 16, 32, 25.0)


def test_workers_and_chosen_numbers_give_the_same_clips(tmp_path):
    five_clips(tmp_path)
    for where in ("driving", str(tmp_path)):
        source, ahead = open_data(where, 16, 32, 10.0), open_data(where, 16, 32, 10.0, workers=2)
        assert ahead.labelled == source.labelled
        for step in range(3):
            ours, theirs = ahead.clips((0, 3, step), [2, 0], 2, 5.0), source.clips((0, 3, step), 3, 2, 5.0)
            assert torch.equal(ours.video, theirs.video[[2, 0]]) and torch.equal(ours.night, theirs.night[[2, 0]])
            assert all(request[0][2] > step for request in ahead.coming) and len(ahead.coming) == 2
        ahead.pool.shutdown(cancel_futures=True)


def test_kept_latents_are_those_of_the_frames(tmp_path, monkeypatch):
    five_clips(tmp_path / "clips")
    write_frames(tmp_path / "clips" / "moving", 20, 10)
    lesson02 = import_module("02_image_ldm")
    image = lesson02.ImageModel(preset_config(lesson02.Config, lesson02.PRESETS, "smoke", height=16, width=32))
    config = preset_config(lesson02.Config, lesson02.PRESETS, "smoke", data=str(tmp_path / "clips"),
                           out=str(tmp_path / "out"), precision="float32", cache_latents=True)  # fmt: skip
    run, source = Run("02_image_ldm", config), open_data(config.data, 16, 32, 10.0)
    kept, asked = with_latents(run, source, image), ((0, 2, 1), 4, 3, 5.0)
    ours, theirs = kept.clips(*asked), source.clips(*asked)
    assert ours.video.shape == (4, 3, *image.shape) and torch.equal(ours.night, theirs.night)
    torch.testing.assert_close(image.encode(ours.video), image.encode(theirs.video), rtol=2e-3, atol=2e-3)  # halves
    monkeypatch.setattr(image, "autoencoder", None)  # what is there is not made again, by another run neither
    assert torch.equal(ours.video, kept.clips(*asked).video)
    image = lesson02.ImageModel(preset_config(lesson02.Config, lesson02.PRESETS, "smoke", height=16, width=32))
    other = with_latents(run, source, image)  # another autoencoder
    assert other.folder != kept.folder and not list(kept.folder.glob("*.part"))
    run.config.data = "driving"
    with pytest.raises(UserError, match="driving scenes never come twice"):
        with_latents(run, source, image)
