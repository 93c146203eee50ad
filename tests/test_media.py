"""Files as people have them, read as players and viewers show them. tests/media: one small file of each kind."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageSequence

from kit.data import Recording, VideoFolder, examine, open_data, read
from kit.errors import UserError
from kit.media import BT601, BT709, LIMITED, open_picture, video_frames
from kit.pictures import VideoWriter, save_animation, to_uint8

MEDIA = Path(__file__).parent / "media"


def grey(name: str) -> list[int]:
    """The grey at the centre of every frame of a file whose frames are grey."""
    recording = examine(MEDIA / name, 30.0)
    frames = read(recording, np.arange(len(recording.times)), 48, 64)
    return frames[:, 24, 32].mean(axis=1).round().astype(int).tolist()


# %% What players show


def test_a_phone_s_video_is_turned() -> None:
    recording = examine(MEDIA / "phone_rotated.mp4", 30.0)
    assert recording.size == (160, 96) and recording.said == ["turned"]
    frame = read(recording, np.array([0]), 160, 96)[0].astype(int)
    # a quarter turn against the clock, FFmpeg's 90 degrees: the bar at the left is at the bottom, what was above left
    assert frame[155, 48].min() > 200
    assert frame[80, 10, 0] > 200 > 60 > frame[80, 10, 2] and frame[80, 85, 2] > 200 > 60 > frame[80, 85, 0]


def test_pixels_that_are_not_square() -> None:
    recording = examine(MEDIA / "hdv.mp4", 25.0)
    bright = read(recording, np.array([0]), 108, 192)[0, ..., 0] > 127
    assert recording.size == (108, 192) and recording.said == ["pixels made square"]
    assert abs(int(bright.any(0).sum()) - int(bright.any(1).sum())) <= 1  # a disc


def test_hdr_is_named(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    shutil.copy(MEDIA / "pq.mp4", tmp_path)
    open_data(str(tmp_path), 64, 128, 30.0)
    assert "1 HDR, which is not tone-mapped here" in capsys.readouterr().err


def test_a_picture_that_was_stored_lying() -> None:
    picture = np.asarray(open_picture(MEDIA / "phone.jpg")).astype(int)
    assert picture.shape == (96, 64, 3) and picture[5, 32, 0] > 200 and picture[90, 32, 2] > 200


@pytest.mark.parametrize(("mode", "top"), [("I;16", 65535), ("I", 65535), ("L", 255)])
def test_sixteen_bits(tmp_path: Path, mode: str, top: int) -> None:
    kind = np.uint8 if top == 255 else np.uint16 if mode == "I;16" else np.int32
    Image.fromarray((np.linspace(0, 1, 256)[None].repeat(8, 0) * top).astype(kind)).save(tmp_path / "a.tif")
    assert np.abs(np.asarray(open_picture(tmp_path / "a.tif"))[0, :, 0].astype(int) - np.arange(256)).max() <= 1


def test_what_is_transparent_is_black(tmp_path: Path) -> None:
    frame = np.zeros((16, 32, 4), np.uint8)
    frame[..., 1], frame[4:12, 8:24] = 255, (255, 0, 0, 255)  # a red square on nothing, whose hidden colour is green
    Image.fromarray(frame).save(tmp_path / "a.png")
    Image.fromarray(frame).save(tmp_path / "a.gif")
    for name in ("a.png", "a.gif"):
        picture = np.asarray(open_picture(tmp_path / name))
        assert picture[0, 0].tolist() == [0, 0, 0] and picture[8, 16].tolist() == [255, 0, 0]
    recording = examine(MEDIA / "transparent.webp", 10.0)
    assert read(recording, np.array([0]), 48, 96)[0, 0, 0].max() < 10


def test_a_picture_that_cannot_be_read() -> None:
    with pytest.raises(ValueError, match="not a readable picture: .*MAX_TEXT"):
        open_picture(MEDIA / "comfy.png")


@pytest.mark.parametrize(("height", "matrix"), [(64, BT601), (720, BT709)])
def test_what_is_written_says_its_colours(tmp_path: Path, height: int, matrix: int) -> None:
    av = pytest.importorskip("av")
    writer = VideoWriter(tmp_path / "a.mp4", 30.0, height, 128)
    for _ in range(3):
        writer.write(np.full((height, 128, 3), (30, 180, 30), np.uint8))
    writer.close()
    with av.open(str(tmp_path / "a.mp4")) as container:
        frame = next(container.decode(video=0))
        assert (frame.colorspace, frame.color_range) == (matrix, LIMITED)
    _, make = next(video_frames(tmp_path / "a.mp4", 0.0))
    assert np.abs(np.asarray(make())[9, 9].astype(int) - (30, 180, 30)).max() <= 3


def test_an_untagged_large_video_is_taken_for_bt709(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    for height, expected in ((720, BT709), (480, BT601)):
        with av.open(str(tmp_path / "a.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=30)
            stream.width, stream.height, stream.pix_fmt = 128, height, "yuv420p"
            stream.options = {"crf": "5"}
            frame = av.VideoFrame.from_ndarray(np.full((height, 128, 3), (30, 180, 30), np.uint8), format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace=expected)))
            container.mux(stream.encode())
        _, make = next(video_frames(tmp_path / "a.mp4", 0.0))
        assert np.abs(np.asarray(make())[9, 9].astype(int) - (30, 180, 30)).max() <= 3


# %% Which frames exist, and when


def test_a_cover_is_no_video() -> None:
    found = grey("DRONE_0001.MP4")
    assert len(found) == 180 and max(abs(value - i - 20) for i, value in enumerate(found)) <= 2


def test_frames_before_the_first_key_frame_are_not_counted() -> None:
    recording = examine(MEDIA / "dashcam_cut.mkv", 30.0)
    assert len(recording.times) == 150 and recording.times[0] == pytest.approx(1.0)
    assert recording.fps == pytest.approx(30, rel=0.01) and abs(grey("dashcam_cut.mkv")[0] - 50) <= 2


def test_an_avi_with_dropped_frames() -> None:
    times = examine(MEDIA / "cam.avi", 30.0).times
    assert len(times) == 100 and times[60] == pytest.approx(2.0) and times[61] == pytest.approx(2.1)
    assert times[-1] - times[0] == pytest.approx(5.9)


def test_a_poster_is_no_frame() -> None:
    found = grey("poster.png")
    assert len(found) == 40 and found[0] == 40


def test_a_frame_is_the_same_from_wherever_it_is_read() -> None:
    for name in ("phone_rotated.mp4", "DRONE_0001.MP4", "dashcam_cut.mkv", "cam.avi"):
        recording = examine(MEDIA / name, 30.0)
        whole = read(recording, np.arange(len(recording.times)), 32, 32)
        for i in (0, 41, 77, len(whole) - 2):
            assert np.array_equal(read(recording, np.array([i, i + 1, i + 1]), 32, 32), whole[[i, i + 1, i + 1]])


def test_a_transport_stream_is_searched_roughly_and_read_right(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "CLIP.TS"), "w", format="mpegts") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt, stream.options = 64, 32, "yuv420p", {"crf": "5", "g": "20"}
        for i in range(120):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((32, 64, 3), 2 * i, np.uint8), "rgb24")))
        container.mux(stream.encode())
    recording = open_data(str(tmp_path), 32, 64, 30.0).recordings[0]  # a suffix in capitals
    for i in (0, 50, 100):
        assert abs(int(read(recording, np.array([i]), 32, 64)[0, 9, 9, 0]) - 2 * i) <= 2


# %% No clip across a hole in time


def with_times(times: np.ndarray) -> Recording:
    return Recording(Path("a.mp4"), times)


def test_a_missing_frame_now_and_then_passes() -> None:
    recording = examine(MEDIA / "phone_29.5fps.mp4", 30.0)
    assert not recording.problem(33, 30.0) and not recording.problem(3, 30 / 16)


def test_no_clip_is_drawn_across_a_pause() -> None:
    times = np.concatenate([np.arange(60) / 30, 100 + np.arange(90) / 30])
    recording = with_times(times)
    starts = recording.starts(16, 30.0)
    assert len(starts) == 2 and not recording.problem(16, 30.0)
    for low, high in starts:
        for start in np.linspace(low, high, 50):
            wanted = start + np.arange(16) / 30
            assert np.abs(times[:, None] - wanted).min(axis=0).max() <= 0.53 / 30
    lengths = (starts[:, 1] - starts[:, 0]) * 30
    assert lengths == pytest.approx([44, 74], abs=1.2)  # as many as there are without the pause
    assert "holes" in recording.problem(100, 30.0) and "fps" in with_times(np.arange(60) / 10).problem(8, 30.0)


def test_clips_of_a_folder_stay_on_one_side_of_a_pause(tmp_path: Path) -> None:
    shutil.copy(MEDIA / "phone_29.5fps.mp4", tmp_path)
    source = VideoFolder(tmp_path, 32, 32, 30.0)
    (recording,) = source.recordings
    recording.times = np.concatenate([recording.times[:60], recording.times[60:] + 50])
    for chosen, indices in source.choose((0,), 40, 12, 30.0, "train"):
        assert chosen is recording and (indices.max() < 60 or indices.min() >= 60)


# %% Folders


def test_videos_at_any_depth_and_names_with_dots_and_colons(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    deep = tmp_path / "2024.05.01" / "front"
    deep.mkdir(parents=True)
    shutil.copy(MEDIA / "DRONE_0001.MP4", deep / "12:30.05.mp4")
    shutil.copy(MEDIA / "phone.jpg", deep / "12:30.05.jpg")  # a thumbnail beside it
    (deep / "12:30.05.txt").write_text("a café", "utf-16")
    frames = tmp_path / "frames.v1"
    frames.mkdir()
    for i in range(4):
        Image.fromarray(np.full((8, 16, 3), i, np.uint8)).save(frames / f"{i}.png")
    (tmp_path / "frames.v1.txt").write_bytes("a café".encode("cp1252"))
    (tmp_path / "notes.pdf").write_bytes(b"%PDF")
    (tmp_path / "labels.csv").write_bytes("\ufeffname , night, cars\n2024.05.01/front/12:30.05.mp4, 1, 2\n".encode())
    source = open_data(str(tmp_path), 16, 32, 30.0)
    assert [r.path.name for r in source.recordings] == ["12:30.05.mp4", "frames.v1"]
    assert [r.caption for r in source.recordings] == ["a café", "a café"]
    assert [r.night for r in source.recordings] == [1, -1]
    said = capsys.readouterr().err
    assert "skipped 2 of 4 files" in said and "notes.pdf" in said and "12:30.05.jpg (a single picture)" in said
    assert "read as Windows-1252" in said and "2 clips, 0.1 minutes, 30 fps, 16 x 8 to 64 x 48" in said


@pytest.mark.parametrize("header", ["name,nigth,cars", "clip,night", "name;night"])
def test_unknown_columns_are_named(tmp_path: Path, header: str) -> None:
    shutil.copy(MEDIA / "DRONE_0001.MP4", tmp_path / "a.mp4")
    (tmp_path / "labels.csv").write_text(f"{header}\na,1\n")
    with pytest.raises(UserError, match=r"labels.csv, line 1: has .*the columns are name, night, cars, caption"):
        open_data(str(tmp_path), 16, 32, 30.0)


def test_names_are_compared_as_they_look(tmp_path: Path) -> None:
    name = "cafe\u0301"  # as macOS writes it
    shutil.copy(MEDIA / "DRONE_0001.MP4", os.path.join(tmp_path, f"{name}.mp4"))
    (tmp_path / "labels.csv").write_text("name,cars\ncaf\u00e9,3\n", "utf-8")
    assert open_data(str(tmp_path), 16, 32, 30.0).recordings[0].cars == 3


def drive() -> np.ndarray:
    """24 frames of a real clip, t h w 3 uint8."""
    return to_uint8(open_data("driving", 64, 128, 30.0).clips((1,), 1, 24, 30.0, "held-out").video[0])


def written(frames: np.ndarray, path: Path) -> np.ndarray:
    """Frames as an animation shows them; as float, for differences."""
    save_animation(iter(frames), path, 30)
    with Image.open(path) as animation:
        return np.stack([np.asarray(image.convert("RGB")) for image in ImageSequence.Iterator(animation)]).astype(float)


def changes(video: np.ndarray) -> np.ndarray:
    return np.abs(np.diff(video.astype(float), axis=0)).mean((1, 2, 3))


@pytest.mark.parametrize("name", ["drive.webp", "drive.gif"])
def test_a_small_animation_is_as_restless_as_its_video(name: str, tmp_path: Path) -> None:
    """A palette for each frame makes a gif boil, 2.7 times; WebP with losses makes small pictures boil, twice."""
    shown, truly = changes(written(drive(), tmp_path / name)), changes(drive())
    assert 0.7 * truly.mean() < shown.mean() < 1.3 * truly.mean()
    assert shown.max() < 1.3 * truly.max()


def test_a_large_animated_webp_does_not_pulse(tmp_path: Path) -> None:
    """WebP's own key frames redraw the whole picture every few frames, a jump that the video has not."""
    shown = changes(written(drive().repeat(2, axis=1).repeat(2, axis=2), tmp_path / "drive.webp"))
    assert len(shown) == 23 and shown.max() < 1.7 * np.median(shown)  # 2.1 with them, 1.5 without


@pytest.mark.parametrize("zoom", [1, 2])
def test_what_fades_does_not_stay_in_the_picture(zoom: int, tmp_path: Path) -> None:
    """WebP leaves out blocks that differ from the frame before by a few levels, however many frames do so."""
    frames = np.concatenate([drive(), drive()]).repeat(zoom, axis=1).repeat(zoom, axis=2)
    cloud = (100 - 2 * np.arange(48)).astype(np.uint8)
    frames[:, 8:40, 8:40] = cloud[:, None, None, None]
    shown = written(frames, tmp_path / "fading.webp")
    off = np.abs(shown - frames)[:, 8:40, 8:40].mean((1, 2, 3))
    assert off.max() < 6  # where WebP decides, 75 and 52 at the end
