"""Weights of Stable Diffusion and Stable Video Diffusion, from a file or folder the user has, into our modules.

Our modules carry the names of the CompVis checkpoints, so a CompVis file needs no renaming at all; a diffusers folder
needs the published map of names, `compvis_name` and `compvis_autoencoder_name`. What a network looks like is read off
the shapes of its weights. Nothing is loaded before everything has been checked.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from common.autoencoder import Autoencoder, ResnetBlock
from common.blocks import channels_last
from common.diffusion import Diffusion
from common.image_model import ImageModel
from common.temporal import TemporalOptions, is_temporal
from common.unet import UNet
from kit.data import Clips
from kit.errors import UserError, note
from kit.files import fingerprint, load_checkpoint, save_checkpoint

Weights = dict[str, torch.Tensor]
PREFIXES = {"unet": "model.diffusion_model.", "autoencoder": "first_stage_model.", "text": "cond_stage_model."}
FOLDERS = {"unet": "unet", "autoencoder": "vae"}  # of a diffusers pipeline
FIRST = {"unet": "input_blocks.0.0.weight", "autoencoder": "encoder.conv_in.weight"}  # a name that each part has


# Arguments of UNet and Autoencoder that make the released models: what --dry-run counts where there is no file.
SHAPES: dict[str, dict] = {
    "sd1": dict(in_channels=4, out_channels=4, channels=320, multipliers=(1, 2, 4, 4), depth=2, attention=(1, 2, 4),
                heads=8, context_dim=768, linear=False),
    "sd2": dict(in_channels=4, out_channels=4, channels=320, multipliers=(1, 2, 4, 4), depth=2, attention=(1, 2, 4),
                head_channels=64, context_dim=1024),
    "x4": dict(in_channels=7, out_channels=4, channels=256, multipliers=(1, 2, 2, 4), depth=2, attention=(2, 4, 8),
               text_only=(2, 4), heads=8, context_dim=1024, label_classes=1000),
}
AUTOENCODERS: dict[str, dict] = {
    "sd1": dict(channels=128, multipliers=(1, 2, 4, 4), depth=2, z_channels=4, regularizer="kl"),
    "x4": dict(channels=128, multipliers=(1, 2, 4), depth=2, z_channels=4, regularizer="kl"),
}
AUTOENCODERS["sd2"] = AUTOENCODERS["sd1"]


# %% Files


WRAPPERS = ("state_dict", "model", "module", "model_state_dict")  # keys under which training programs keep the names
WRAPPED = ("module.", "_orig_mod.")  # what they put in front of every name
NOT_WEIGHTS = {b"<": "a web page", b"version https://git-lfs": "a Git LFS pointer, not the file it stands for"}


def read_file(path: Path) -> Weights:
    """Every tensor of a .safetensors or torch file. UserError for one that is broken or holds code."""
    try:
        begin = b""
        if path.is_file():
            with path.open("rb") as file:
                begin = file.read(32)
        for mark, what in NOT_WEIGHTS.items():
            if begin.lstrip().startswith(mark):
                raise UserError(f"{path} is {what}: download it again")
        if path.suffix == ".safetensors":
            try:
                from safetensors.torch import load_file
            except ImportError:
                raise UserError(f'{path} needs safetensors: pip install -e ".[sd]"') from None
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped(path))
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # torch and safetensors raise a dozen kinds for broken files
        if "weights_only" in str(error) or "Weights only" in str(error):
            raise UserError(f"{path} holds more than tensors, and reading it would run its code: convert it to "
                            ".safetensors first") from None
        raise UserError(f"{path} cannot be read ({type(error).__name__}): truncated, or not a checkpoint") from None
    while isinstance(content, dict) and (inner := [content[k] for k in WRAPPERS if isinstance(content.get(k), dict)]):
        content = inner[0]
    content = content if isinstance(content, dict) else {}
    weights = {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}
    if not weights:
        raise UserError(f"{path} holds no named tensors: not a checkpoint")
    while any(all(name.startswith(prefix) for name in weights) for prefix in WRAPPED):
        weights = {name.partition(".")[2]: value for name, value in weights.items()}
    return weights


def kind(weights: Weights) -> str:
    """What a file that does not fit is, from its names and shapes; "" where nothing is known."""
    first, context = weights.get(FIRST["unet"]), [v for k, v in weights.items() if k.endswith("attn2.to_k.weight")]
    signs = {
        "a LoRA, which changes a model and is none": any("lora_" in name for name in weights),
        "a ControlNet": any("control_model" in name or "input_hint_block" in name for name in weights),
        "Stable Diffusion XL": bool(context) and context[-1].shape[1] == 2048,
        "a video model": any("time_stack" in name or "temporal" in name for name in weights),
        "an inpainting model": first is not None and first.shape[1] == 9,
        "the x4 upscaler": first is not None and first.shape[1] == 7,
    }
    return next((name for name, seen in signs.items() if seen), "")


def values_of(weights: Weights) -> str:
    """A fingerprint of weights, of samples of their values."""
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        some = value.flatten()[:: max(1, value.numel() // 16)][:16].float()
        digest.update(name.encode() + some.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def settings_of(folder: Path, part: str) -> dict:
    """What a diffusers folder says of a part ("scheduler", "vae"); {} for a file or where it says nothing."""
    for name in ("config.json", f"{part}_config.json"):
        path = folder / part / name
        if path.is_file():
            try:
                return json.loads(path.read_text("utf-8"))
            except ValueError:
                raise UserError(f"{path} is not readable JSON") from None
    return {}


def zipped(path: Path) -> bool:
    """torch can map files of its newer format into memory, which begin like a zip file."""
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def read_folder(folder: Path, part: str) -> Weights:
    """The weights of one part of a diffusers pipeline: of FOLDER/unet and the like, or of FOLDER itself."""
    inner = folder / FOLDERS[part] if (folder / FOLDERS[part]).is_dir() else folder
    for pattern in ("*.safetensors", "*.bin"):
        files = sorted(inner.glob(pattern))
        plain = [f for f in files if ".fp16." not in f.name and ".non_ema." not in f.name] or files
        if plain:
            return {name: value for file in plain for name, value in read_file(file).items()}
    if any((folder / other).is_dir() for other in FOLDERS.values()):
        return {}  # a pipeline without this part
    raise UserError(f"{inner}: no .safetensors or .bin file in this folder")


def read_part(path: str | Path, part: str, ema: bool = False) -> Weights:
    """One part ("unet" or "autoencoder") of a checkpoint under CompVis names without prefix, or {}."""
    path, renamed = Path(path), {"unet": from_diffusers_unet, "autoencoder": from_diffusers_autoencoder}[part]
    if path.is_dir():
        return renamed(read_folder(path, part))
    weights, prefix = read_file(path), PREFIXES[part]
    found = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    if ema and part == "unet":
        found = averaged(weights, found, path)
    if not found and not any(name.startswith(p) for name in weights for p in PREFIXES.values()):
        found = weights  # a file of this part alone
        if any(name.startswith(("down_blocks.", "encoder.down_blocks.")) for name in weights):
            found = renamed(found)
    return found


def averaged(weights: Weights, names: Iterable[str], path: Path) -> Weights:
    """The moving averages, which CompVis files keep under names without dots."""
    found = {name: weights.get("model_ema.diffusion_model" + name.replace(".", "")) for name in names}
    if missing := [name for name, value in found.items() if value is None]:
        raise UserError(f"{path} has no moving averages ({len(missing)} of {len(found)} missing); leave out --ema")
    return found


# %% diffusers' names


RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
          "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
OUTER = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
         "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
         "class_embedding": "label_emb", "add_embedding.linear_1": "label_emb.0.0",
         "add_embedding.linear_2": "label_emb.0.2"}


def from_diffusers_unet(weights: Weights) -> Weights:
    depth = 1 + max((int(m[1]) for name in weights if (m := re.match(r"down_blocks\.0\.resnets\.(\d+)", name))),
                    default=1)
    attentive = {m[1] for name in weights if (m := re.match(r"up_blocks\.(\d+)\.attentions", name))}
    return {compvis_name(name, depth, attentive): value for name, value in weights.items()}


def compvis_name(name: str, depth: int, attentive: set[str]) -> str:
    """A parameter of diffusers' U-Nets, image or video, under its CompVis name. Unknown names stay as they are.

    depth: residual blocks a level; attentive: numbers of the up blocks that have transformers.
    """
    for theirs, ours in OUTER.items():
        if name.startswith(theirs + "."):
            return ours + name.removeprefix(theirs)
    pattern = r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)"
    if not (m := re.match(pattern, name)):
        return name
    where, kind, i, j, rest = m[1], m[3], int(m[2] or 0), int(m[4]), m[5]
    if where == "mid":
        slot = "middle_block." + ("1" if kind == "attentions" else str(2 * j))
    elif kind == "downsamplers":
        return f"input_blocks.{(depth + 1) * (i + 1)}.0.op.{rest.removeprefix('conv.')}"
    elif kind == "upsamplers":
        return f"output_blocks.{(depth + 1) * i + depth}.{2 if m[2] in attentive else 1}.{rest}"
    else:
        number = (depth + 1) * i + j + (where == "down")
        slot = f"{'input' if where == 'down' else 'output'}_blocks.{number}.{int(kind == 'attentions')}"
    if kind == "resnets":  # in video networks spatial_res_block, temporal_res_block and time_mixer
        rest = rest.removeprefix("spatial_res_block.").replace("temporal_res_block.", "time_stack.")
        return f"{slot}.{'.'.join(RESNET.get(word, word) for word in rest.split('.'))}"
    rest = rest.replace("temporal_transformer_blocks.", "time_stack.")
    return f"{slot}.{re.sub('time_pos_embed.linear_([12])', lambda n: f'time_pos_embed.{2 * int(n[1]) - 2}', rest)}"


ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out",
             "query": "q", "key": "k", "value": "v", "proj_attn": "proj_out"}  # the last four: files of 2022


def from_diffusers_autoencoder(weights: Weights) -> Weights:
    levels = 1 + max((int(m[1]) for name in weights if (m := re.match(r"decoder\.up_blocks\.(\d+)", name))), default=0)
    found = {}
    for name, value in weights.items():
        ours = compvis_autoencoder_name(name, levels)
        if re.search(r"mid\.attn_1\.(q|k|v|proj_out)\.weight", ours) and value.dim() == 2:
            value = value[..., None, None]  # a Linear there, a 1x1 convolution here
        found[ours] = value
    return found


def compvis_autoencoder_name(name: str, levels: int) -> str:
    """A parameter of diffusers' AutoencoderKL under its CompVis name. Unknown names stay as they are."""
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    if m := re.match(r"(.*)mid_block\.attentions\.0\.(.*)\.(weight|bias)$", name):
        return f"{m[1]}mid.attn_1.{ATTENTION.get(m[2], m[2])}.{m[3]}"
    name = re.sub(r"encoder\.down_blocks\.(\d+)", r"encoder.down.\1", name)
    name = re.sub(r"decoder\.up_blocks\.(\d+)", lambda m: f"decoder.up.{levels - 1 - int(m[1])}", name)
    name = name.replace(".resnets.", ".block.").replace("downsamplers.0", "downsample")
    return name.replace("upsamplers.0", "upsample").replace("conv_shortcut", "nin_shortcut").replace(
        "conv_norm_out", "norm_out")


# %% What a network looks like, from the shapes of its weights


def architecture(weights: Weights, path: str | Path, heads: int = 0, head_channels: int = 0) -> dict:
    """The arguments of UNet. Heads cannot be seen in shapes; without them the released models' are taken."""
    first = FIRST["unet"]
    if first not in weights or "out.2.weight" not in weights:
        what = f"; it looks like {known}" if (known := kind(weights)) else ""
        raise UserError(f"{path} has no weights of a U-Net (no input_blocks.0.0 or out.2){what}")
    channels, multipliers, counts, attention, text_only = weights[first].shape[0], [], [0], [], []
    block, factor, context_dim, linear = 1, 1, 0, True
    while any(name.startswith(f"input_blocks.{block}.") for name in weights):
        at = f"input_blocks.{block}"
        if f"{at}.0.op.weight" in weights:
            factor, counts = 2 * factor, [*counts, 0]
        else:
            width = weights[f"{at}.0.in_layers.2.weight"].shape[0]
            counts[-1] += 1
            multipliers = [*multipliers[: len(counts) - 1], width // channels]
            inner = f"{at}.1.transformer_blocks.0"
            if f"{inner}.attn1.to_k.weight" in weights:
                attention = list(dict.fromkeys([*attention, factor]))
                linear = weights[f"{at}.1.proj_in.weight"].dim() == 2
                context_dim = weights[f"{inner}.attn2.to_k.weight"].shape[1]
                if weights[f"{inner}.attn1.to_k.weight"].shape[1] != width:
                    text_only = list(dict.fromkeys([*text_only, factor]))
        block += 1
    label = weights.get("label_emb.weight")
    vector = weights.get("label_emb.0.0.weight")
    if not heads and not head_channels:
        released = {(768, False): dict(heads=8), (1024, False): dict(head_channels=64), (1024, True): dict(heads=8)}
        if (context_dim, label is not None) not in released:
            what = f" but {known}" if (known := kind(weights)) else ""
            raise UserError(f"{path} is no released model{what} (context of width {context_dim}): say how many heads")
        chosen = released[context_dim, label is not None]
        heads, head_channels = chosen.get("heads", 0), chosen.get("head_channels", 0)
    return dict(
        in_channels=weights[first].shape[1], out_channels=weights["out.2.weight"].shape[0], channels=channels,
        multipliers=tuple(multipliers), depth=counts[0], attention=tuple(attention), text_only=tuple(text_only),
        heads=heads, head_channels=head_channels, context_dim=context_dim, linear=linear,
        label_classes=label.shape[0] if label is not None else -vector.shape[1] if vector is not None else 0,
        temporal=temporal_options(weights),
    )


def temporal_options(weights: Weights) -> TemporalOptions | None:
    """The temporal layers that a file brings along (Stable Video Diffusion's), or None."""
    to_k = [v for name, v in weights.items() if name.endswith("time_stack.0.attn2.to_k.weight")]
    return TemporalOptions(context_dim=to_k[0].shape[1]) if to_k else None


def autoencoder_architecture(weights: Weights, path: str | Path) -> dict:
    """The arguments of Autoencoder (KL)."""
    if FIRST["autoencoder"] not in weights:
        raise UserError(f"{path} has no weights of an autoencoder (no encoder.conv_in)")
    channels, multipliers, depth = weights["encoder.conv_in.weight"].shape[0], [], 0
    while (width := weights.get(f"encoder.down.{len(multipliers)}.block.0.conv2.weight")) is not None:
        multipliers.append(width.shape[0] // channels)
    while f"encoder.down.0.block.{depth}.conv1.weight" in weights:
        depth += 1
    attention = any(name.startswith("encoder.down.") and ".attn." in name for name in weights)
    return dict(channels=channels, multipliers=tuple(multipliers), depth=depth, attention=attention,
                z_channels=weights["decoder.conv_in.weight"].shape[1], regularizer="kl")


# %% Loading, all or nothing


@dataclass
class Report:
    """What becomes of every name. Loading is possible when the last three are empty."""

    loaded: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)  # ours, and not in the file, as they may be: temporal layers
    missing: list[str] = field(default_factory=list)  # ours, and not in the file, as they may not
    unexpected: list[str] = field(default_factory=list)  # in the file, and not ours
    wrong_shape: list[str] = field(default_factory=list)  # in both, with different shapes

    def __str__(self) -> str:
        lines = []
        for name, values in vars(self).items():
            some = ", ".join(values[:3]) + (", ..." if len(values) > 3 else "")
            lines.append(f"{name}: {len(values)}" + (f" ({some})" if values and name != "loaded" else ""))
        return "\n".join(lines)


def compare(module: nn.Module, weights: Weights, may_be_new: Callable[[str], bool] = is_temporal) -> Report:
    report, ours = Report(), module.state_dict()
    for name, value in ours.items():
        if name not in weights:
            (report.new if may_be_new(name) else report.missing).append(name)
        elif weights[name].shape != value.shape:
            report.wrong_shape.append(f"{name} {tuple(weights[name].shape)}, not {tuple(value.shape)}")
        else:
            report.loaded.append(name)
    report.unexpected = [name for name in weights if name not in ours]
    return report


def load_weights(module: nn.Module, weights: Weights, path: str | Path,
                 may_be_new: Callable[[str], bool] = is_temporal) -> Report:
    """Copies the weights into the module, or raises a UserError and copies nothing."""
    report = compare(module, weights, may_be_new)
    for what in ("missing", "unexpected", "wrong_shape"):
        if names := getattr(report, what):
            some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            known = f"; it looks like {looks}" if (looks := kind(weights)) else ""
            raise UserError(f"{path} does not fit this network: {len(names)} {what.replace('_', ' ')} ({some}){known}")
    if spoilt := next((name for name in report.loaded if not torch.isfinite(weights[name]).all()), None):
        raise UserError(f"{path}: {spoilt} has values that are not finite")
    module.load_state_dict({name: weights[name] for name in report.loaded}, strict=False)
    return report


def load_autoencoder(path: str | Path, scale: float | None = None) -> Autoencoder:
    """The autoencoder of a file or folder. scale: what latents are multiplied by (0.08333 for the x4 upscaler); None:
    what a folder says, else 0.18215."""
    scale = settings_of(Path(path), "vae").get("scaling_factor", 0.18215) if scale is None else scale
    weights = {name: value for name, value in read_part(path, "autoencoder").items() if not name.startswith("loss.")}
    autoencoder = Autoencoder(**autoencoder_architecture(weights, path))
    load_weights(autoencoder, weights, path)
    autoencoder.scale.fill_(scale)
    return autoencoder


def inspect(path: str | Path, heads: int = 0) -> str:
    """What is in a checkpoint, part by part, and what becomes of each name; for `--inspect`."""
    lines = []
    for part in ("unet", "autoencoder"):
        weights = read_part(path, part)
        if FIRST[part] not in weights:  # a file or folder of another part alone
            continue
        with torch.device("meta"):
            if part == "unet":
                found = architecture(weights, path, heads)
                found["temporal"] = found["temporal"] or TemporalOptions(context_dim=found["context_dim"])
                module: nn.Module = UNet(**found)
            else:
                found = autoencoder_architecture(weights, path)
                module = Autoencoder(**found)
        lines += [f"{part}: " + ", ".join(f"{k} {v}" for k, v in found.items()),
                  f"{part} parameters: {sum(value.numel() for value in weights.values())}",
                  str(compare(module, weights))]
    if not lines:
        raise UserError(f"{path} has neither a U-Net nor an autoencoder in it")
    return "\n".join(lines)


# %% Text


class TextEncoder(nn.Module):
    """CLIP's text model from a local folder: captions -> b 77 d (Stable Diffusion 1.x: 768, 2.x: 1024 wide).

    2.x was trained on the last layer but one; a folder that still has all 24 layers of that model is read so. What was
    encoded once is kept in `cache`, a folder, from which it is read again without the model. Frozen until `tune`.
    """

    def __init__(self, folder: str | Path, device: torch.device | str = "cpu", cache: Path | None = None) -> None:
        super().__init__()
        self.folder, self.device, self.cache, self.model = Path(folder), device, cache, None
        config = self.folder / "text_encoder" / "config.json"
        config = config if config.exists() else self.folder / "config.json"
        try:
            settings = json.loads(config.read_text("utf-8"))
        except (OSError, ValueError):
            raise UserError(f"--text-encoder {folder}: no readable config.json of a CLIP text model in it") from None
        settings = settings.get("text_config", settings)
        self.width = settings["hidden_size"]
        self.penultimate = self.width == 1024 and settings["num_hidden_layers"] == 24
        self.places = {name: self.folder / name if (self.folder / name).is_dir() else self.folder
                       for name in ("text_encoder", "tokenizer")}
        here = {file.name for file in self.places["tokenizer"].iterdir()}
        if "tokenizer.json" not in here and not {"vocab.json", "merges.txt"} <= here:
            raise UserError(f"--text-encoder {folder}: no tokenizer in it (vocab.json, merges.txt; or tokenizer.json)")
        self.key = repr([fingerprint(place) for place in self.places.values()])

    def load(self) -> None:
        try:
            from transformers import CLIPTextModel, CLIPTokenizer
        except ImportError:
            raise UserError('--text-encoder needs transformers: pip install -e ".[sd]"') from None
        try:
            self.tokenizer = CLIPTokenizer.from_pretrained(self.places["tokenizer"], local_files_only=True)
            self.model, report = CLIPTextModel.from_pretrained(self.places["text_encoder"], local_files_only=True,
                                                               output_loading_info=True)
        except Exception as error:
            first = str(error).strip().splitlines()[0]
            raise UserError(f"--text-encoder {self.folder}: not CLIP's text model and tokenizer ({first})") from None
        if missing := [name for name in report["missing_keys"] if not name.endswith("position_ids")]:
            raise UserError(f"--text-encoder {self.folder}: {len(missing)} weights of CLIP's text model are not in it "
                            f"({sorted(missing)[0]}, ...)")
        self.model.requires_grad_(False).eval().to(self.device)

    def tune(self) -> None:
        """Makes the encoder trainable (DreamBooth); from now on nothing is read from the cache or kept in it."""
        self.cache = None
        if self.model is None:
            self.load()
        self.model.requires_grad_(True)

    def encode(self, captions: list[str]) -> torch.Tensor:
        if self.model is None:
            self.load()
        for caption in captions:
            words = self.tokenizer(caption, verbose=False).input_ids
            if len(words) > 77:
                note(f"left out, beyond the 77 tokens that CLIP reads: {self.tokenizer.decode(words[76:-1])}")
        tokens = self.tokenizer(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
        out = self.model(tokens.input_ids.to(self.device), output_hidden_states=self.penultimate)
        if not self.penultimate:
            return out.last_hidden_state.float()
        inner = getattr(self.model, "text_model", self.model)  # transformers 5 has no text_model in between
        return inner.final_layer_norm(out.hidden_states[-2]).float()

    def forward(self, captions: list[str]) -> torch.Tensor:
        if self.cache is None:
            return self.encode(captions)
        self.cache.mkdir(parents=True, exist_ok=True)
        files = {caption: self.cache / (hashlib.sha256((self.key + caption).encode()).hexdigest()[:24] + ".pt")
                 for caption in captions}
        if new := [caption for caption, file in files.items() if not file.exists()]:
            with torch.no_grad():
                rows = self.encode(new).cpu()
            for caption, row in zip(new, rows, strict=True):
                save_checkpoint(files[caption], {"config": {}, "row": row.clone()})
        rows = [load_checkpoint(files[caption], "the same command again")["row"] for caption in captions]
        return torch.stack(rows).to(self.device)


class CaptionTokens(nn.Module):
    """The captions of clips as tokens, b 77 d. A dropped caption is the empty one, as Stable Diffusion has it."""

    kind = "text"

    def __init__(self, encoder: TextEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, clips: Clips, drop: torch.Tensor | None = None) -> torch.Tensor:
        kept = [caption if drop is None or not drop[i] else "" for i, caption in enumerate(clips.captions)]
        return self.encoder(kept)


# %% The whole of it, as the lessons see an image model


@dataclass
class Frozen:
    """What later lessons ask of an image model's configuration."""

    height: int
    width: int
    parameterization: str
    p_drop: float = 0.1  # of captions in training; not in the paper, and what Stable Diffusion was trained with
    pixel: bool = False
    condition: str = "text"


def predicted(path: Path, asked: str) -> str:
    """What a model predicts: as its folder's scheduler says, as is asked for, or eps. UserError where both differ, and
    for other betas than Stable Diffusion's."""
    said = settings_of(path, "scheduler")
    named = {"epsilon": "eps", "v_prediction": "v"}.get(said.get("prediction_type", ""), "")
    if asked and named and asked != named:
        raise UserError(f"--parameterization {asked}: {path}/scheduler says {named}")
    betas = tuple(said.get(key) for key in ("beta_start", "beta_end", "beta_schedule"))
    if said and betas != (0.00085, 0.012, "scaled_linear"):
        raise UserError(f"{path}/scheduler has other betas than Stable Diffusion ({', '.join(map(str, betas))})")
    return asked or named or "eps"


def check_text_to_image(image: "StableDiffusion") -> None:
    """Raises UserError for a U-Net that takes or gives more than latents of frames."""
    found = image.architecture
    channels = found["in_channels"], found["out_channels"]
    if channels != (4, 4) or found.get("label_classes") or found.get("temporal"):
        what = kind(image.weights) or f"a network of {channels[0]} input channels"
        raise UserError(f"--backbone {image.path}: not text to image but {what}")


class StableDiffusion(ImageModel):
    """Stable Diffusion 1.x or 2.x, with all that lessons ask of an ImageModel. Frozen.

    path: a CompVis file or a diffusers folder; "sd1" or "sd2" for a network of that shape without weights (--dry-run).
    text: its encoder; None where no captions will be read. Raises UserError for what does not fit.
    """

    def __init__(self, path: str, text: TextEncoder | None, height: int, width: int, parameterization: str = "",
                 device: torch.device | str = "cpu", ema: bool = False) -> None:
        self.path, self.device = path, device
        parameterization = predicted(Path(path), parameterization)
        self.config = Frozen(height, width, parameterization)
        self.weights, self.architecture, self.coder = {}, SHAPES.get(path), AUTOENCODERS.get(path)
        if self.architecture is not None and torch.device(device).type != "meta":
            raise UserError(f"--backbone {path} is a shape, to count with --dry-run; give a file or folder to train")
        if self.architecture is None:
            self.weights = read_part(path, "unet", ema)
            self.architecture = architecture(self.weights, path)
            self.autoencoder = load_autoencoder(path)
            self.coder = autoencoder_architecture(self.autoencoder.state_dict(), path)
        else:
            self.autoencoder = Autoencoder(**self.coder)
        self.autoencoder = channels_last(self.autoencoder).to(device).requires_grad_(False).eval()
        if text is not None and text.width != self.architecture["context_dim"]:
            raise UserError(f"--text-encoder {text.folder} is {text.width} wide, {path} wants "
                            f"{self.architecture['context_dim']}: 1.x has CLIP ViT-L/14, 2.x OpenCLIP ViT-H")
        self.conditioner = None if text is None else CaptionTokens(text)
        self.diffusion = Diffusion("sqrt_linear", 0.00085, 0.012, parameterization, device)
        factor = 8 * 2 ** (len(self.architecture["multipliers"]) - 1)
        if height % factor or width % factor:
            raise UserError(f"--size {height} {width}: not multiples of {factor}, as {path} wants")
        self.shape = (4, height // 8, width // 8)

    def unet(self, temporal: TemporalOptions | None = None) -> UNet:
        unet = UNet(**self.architecture | {"temporal": temporal})
        if self.weights:
            load_weights(unet, self.weights, self.path)
        return channels_last(unet).to(self.device)

    def new_autoencoder(self, block: type[nn.Module] = ResnetBlock) -> Autoencoder:
        return Autoencoder(**self.coder, block=block)

    @property
    def lineage(self) -> dict:
        backbone = values_of(self.weights) if self.weights else self.path
        return {"backbone": backbone, "parameterization": self.config.parameterization,
                "height": self.config.height, "width": self.config.width}

