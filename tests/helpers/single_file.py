"""Write a small Stable Diffusion pipeline as one checkpoint file, with the names of the original code."""

import re

from safetensors.torch import save_file

PER_BLOCK = 2  # layers_per_block + 1 of the small UNet
RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
UNET = {
    r"time_embedding\.linear_(\d)": lambda m: f"time_embed.{2 * int(m[1]) - 2}",
    r"conv_in": lambda _: "input_blocks.0.0",
    r"conv_norm_out": lambda _: "out.0",
    r"conv_out": lambda _: "out.2",
    r"down_blocks\.(\d)\.(resnets|attentions)\.(\d)": lambda m: (
        f"input_blocks.{PER_BLOCK * int(m[1]) + int(m[3]) + 1}.{int(m[2] == 'attentions')}"
    ),
    r"down_blocks\.(\d)\.downsamplers\.0\.conv": lambda m: f"input_blocks.{PER_BLOCK * (int(m[1]) + 1)}.0.op",
    r"mid_block\.resnets\.(\d)": lambda m: f"middle_block.{2 * int(m[1])}",
    r"mid_block\.attentions\.0": lambda _: "middle_block.1",
    r"up_blocks\.(\d)\.(resnets|attentions)\.(\d)": lambda m: (
        f"output_blocks.{PER_BLOCK * int(m[1]) + int(m[3])}.{int(m[2] == 'attentions')}"
    ),
    r"up_blocks\.(\d)\.upsamplers\.0\.conv": lambda m: f"output_blocks.{PER_BLOCK * int(m[1]) + 1}.2.conv",
}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
VAE = {
    r"conv_norm_out": lambda _: "norm_out",
    r"down_blocks\.(\d)\.resnets\.(\d)": lambda m: f"down.{m[1]}.block.{m[2]}",
    r"down_blocks\.(\d)\.downsamplers\.0": lambda m: f"down.{m[1]}.downsample",
    r"mid_block\.resnets\.(\d)": lambda m: f"mid.block_{int(m[1]) + 1}",
    r"mid_block\.attentions\.0": lambda _: "mid.attn_1",
    r"up_blocks\.(\d)\.resnets\.(\d)": lambda m: f"up.{1 - int(m[1])}.block.{m[2]}",
    r"up_blocks\.(\d)\.upsamplers\.0": lambda m: f"up.{1 - int(m[1])}.upsample",
    r"conv_shortcut": lambda _: "nin_shortcut",
}


def save_single_file(pipe, file):
    tensors = {}
    for name, x in pipe.unet.state_dict().items():
        new = next(n for p, f in UNET.items() if (n := re.sub(rf"^{p}(?=\.)", f, name)) != name)
        for old, part in RESNET.items() if ".resnets." in name else ():
            new = new.replace(f".{old}.", f".{part}.")
        tensors[f"model.diffusion_model.{new}"] = x
    for name, x in pipe.vae.state_dict().items():
        new = name
        for pattern, f in VAE.items():
            new = re.sub(rf"(?<=\.){pattern}(?=\.)", f, new)
        for old, part in ATTENTION.items() if ".attentions." in name else ():
            new = new.replace(f".{old}.", f".{part}.")
        tensors[f"first_stage_model.{new}"] = (
            x[:, :, None, None] if ".attentions." in name and x.dim() == 2 else x
        )
    for name, x in pipe.text_encoder.state_dict().items():
        tensors[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = x
    save_file({n: x.contiguous() for n, x in tensors.items()}, file)
