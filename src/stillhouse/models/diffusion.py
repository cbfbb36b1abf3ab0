"""Networks of diffusers by name, built small enough for the data and trained here: `diffusers/unet2d` and `diffusers/dit`."""

from __future__ import annotations

from math import gcd
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.errors import UserError, nearest
from stillhouse.models.families import Fit, _told
from stillhouse.models.sampling import FlowNetwork, Sampling
from stillhouse.models.specs import Spec
from stillhouse.models.weights import load_weights

SHARED: dict[str, Any] = {"size": 32, "null": True, "levels": 32, "guidance": 1.0, "renoise": False}
NETWORKS: dict[str, dict[str, Any]] = {
    "unet2d": {"channels": (32, 64), "layers": 1, "attention": False, "dropout": 0.0, **SHARED},
    "dit": {"width": 64, "depth": 4, "heads": 4, "patch": 2, **SHARED},
}
"""The networks there are, with the defaults of their options."""
CLASSES = ("class_embedding.weight", "class_embedder.embedding_table.weight")
"""What has a row a class."""
TIMES = 1000
"""diffusers counts noise levels in [0, 1] as times in [0, 1000]."""


def open_diffusion(
    spec: Spec, fit: Fit, pretrained: bool, file: dict[str, Tensor] | None = None, allow_partial: bool = False
) -> tuple[nn.Module, dict[str, Any]]:
    """The network `diffusers/unet2d:OPTIONS` or `diffusers/dit:OPTIONS` as a `FlowNetwork`, and the options that build it again.

    diffusers' UNet2DModel takes

    - `channels`: of each resolution, the image's own first; each further one halves the side;
    - `layers`: residual blocks a resolution; `attention`: whether the lowest ones attend; `dropout`.

    Its DiTTransformer2DModel (arXiv 2212.09748) takes `width`, `depth`, `heads` and `patch`. Both take

    - `size`: the image's side in pixels, the data's by default. One that does not divide as often as the network halves it, or into its
      patches, is filled up with zeros inside the network, and what it says there is cut off;
    - `null`: whether there is one more class, for "any", as guidance needs it;
    - `levels`, `guidance`, `renoise`: how images are drawn, see `Sampling`.

    There are no published weights of such networks: `stillhouse distill --method flow` trains one.

    Raises:
        UserError: for an unknown name or option, one that does not fit the data, weights that cannot be had, or if diffusers is missing.
    """
    if spec.name not in NETWORKS:
        raise UserError(f"there is no diffusers network '{spec.name}' here{nearest(spec.name, NETWORKS)}; expected {', '.join(NETWORKS)}")
    if pretrained:
        raise UserError(f"'{spec}' has no published weights, train one with --method flow and name its run folder, or pass a file")
    options = _options(spec, fit)
    sampling = Sampling(*(options[name] for name in ("levels", "guidance", "renoise")))
    shape = (fit.channels, options["size"], options["size"])
    with _told(spec, spec.options):
        body = (_unet2d if spec.name == "unet2d" else _dit)(options, fit)
    model = FlowNetwork(body, shape, fit.classes, null=options["null"], sampling=sampling)
    if file is not None:
        _refuse_other_classes(spec, model, file)
        load_weights(model, file, allow_partial)
    return model, options | sampling.options


def _refuse_other_classes(spec: Spec, model: FlowNetwork, file: dict[str, Tensor]) -> None:
    for name, wanted in model.state_dict().items():
        if name.endswith(CLASSES) and name in file and len(file[name]) != len(wanted):
            more = len(wanted) - model.classes  # for the null condition
            raise UserError(
                f"'{spec}' makes images of {len(file[name]) - more} classes and the data has {model.classes}; train one on these data with "
                "--method flow"
            )


def _options(spec: Spec, fit: Fit) -> dict[str, Any]:
    known = NETWORKS[spec.name]
    for key, value in spec.options.items():
        if key not in known:
            raise UserError(f"diffusers network '{spec.name}' has no option '{key}'{nearest(key, known) or ', leave it out'}")
        kinds = {"levels": (int, tuple, list), "channels": (tuple, list)}.get(key, (int, float) if key in ("guidance", "dropout") else ())
        if type(value) not in (kinds or (type(known[key]),)):
            raise UserError(f"'{spec}' says {key}={value!r}, expected for example {key}={str(known[key]).lower().replace(' ', '')}")
        numbers = [number for number in (value if isinstance(value, (tuple, list)) else (value,)) if not isinstance(number, bool)]
        if key not in ("levels", "guidance", "dropout") and any(type(number) is not int or number < 1 for number in numbers):
            raise UserError(f"'{spec}' says {key}={value!r}, expected whole numbers of at least 1")
    size = spec.options.get("size", fit.image_size or known["size"])
    if fit.image_size is not None and size != fit.image_size:
        raise UserError(f"'{spec}' says size={size} but the data's images have a side of {fit.image_size}, leave size out")
    return {**known, **spec.options, "size": size}


def _unet2d(options: dict[str, Any], fit: Fit) -> nn.Module:
    channels = tuple(options["channels"])
    last = len(channels) - 1
    attends = [options["attention"] and place == last for place in range(len(channels))]
    network = _diffusers("UNet2DModel")(
        sample_size=options["size"],
        in_channels=fit.channels,
        out_channels=fit.channels,
        block_out_channels=channels,
        layers_per_block=options["layers"],
        down_block_types=tuple("AttnDownBlock2D" if each else "DownBlock2D" for each in attends),
        up_block_types=tuple("AttnUpBlock2D" if each else "UpBlock2D" for each in reversed(attends)),
        add_attention=options["attention"],
        attention_head_dim=gcd(8, channels[-1]),
        norm_num_groups=gcd(8, *channels),
        dropout=float(options["dropout"]),
        num_class_embeds=fit.classes + options["null"],
    )
    return Body(network, 2**last)


def _dit(options: dict[str, Any], fit: Fit) -> nn.Module:
    if options["width"] % options["heads"]:
        raise UserError(f"width={options['width']} does not divide into heads={options['heads']}")
    patch = options["patch"]
    network = _diffusers("DiTTransformer2DModel")(
        num_attention_heads=options["heads"],
        attention_head_dim=options["width"] // options["heads"],
        in_channels=fit.channels,
        out_channels=fit.channels,
        num_layers=options["depth"],
        sample_size=-(-options["size"] // patch) * patch,
        patch_size=patch,
        num_embeds_ada_norm=fit.classes,
        norm_num_groups=1,  # of no block of this kind
    )
    for part in network.modules():
        if hasattr(part, "dropout_prob"):
            part.dropout_prob = 0.0  # it would leave labels out by itself while training; who trains says when
    return Body(network, patch)


def _diffusers(name: str) -> Any:
    try:
        import diffusers
    except ImportError:
        raise UserError("networks of diffusers need it: pip install 'stillhouse[generative]'") from None
    return getattr(diffusers, name)


class Body(nn.Module):
    """A network of diffusers, asked by noise level, for images of any side.

    Args:
        network: takes images, times and class numbers, and returns what has a `.sample`.
        multiple: the sides it takes are multiples of this.
    """

    def __init__(self, network: nn.Module, multiple: int) -> None:
        super().__init__()
        self.network, self.multiple = network, multiple

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        """v of the shape of x."""
        height, width = x.shape[-2:]
        missing = [-side % self.multiple for side in (width, height)]
        padded = F.pad(x, (0, missing[0], 0, missing[1])) if any(missing) else x
        answer: Tensor = self.network(padded, TIMES * sigma, class_labels=labels).sample
        return answer[..., :height, :width]
