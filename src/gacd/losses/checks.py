"""What the contrastive losses refuse: each check a UserError that names the tensor."""

from torch import Tensor

from gacd.errors import UserError


def check_temperature(temperature: float) -> None:
    """Refuse one that is not positive, or that would want a gradient."""
    check_constant(temperature=temperature)
    if not temperature > 0:
        raise UserError(f"temperature must be above 0, not {temperature}")


def check_constant(**values: object) -> None:
    """Refuse tensors that ask for a gradient where there is none to give."""
    for name, value in values.items():
        if isinstance(value, Tensor) and value.requires_grad:
            raise UserError(
                f"{name}: constants get no gradient here; detach them"
                + (" (or pass raw features and a projection)" if name == "anchors" else "")
            )


def check_widths(
    student_BE: Tensor, anchors_MD: Tensor, weight_ED: Tensor | None, bias_E: Tensor | None
) -> None:
    """Refuse embeddings, anchors and a projection that do not fit together."""
    if student_BE.dim() != 2 or anchors_MD.dim() != 2:
        raise UserError(
            f"student embeddings must be [B, E] and anchors [M, D], not {list(student_BE.shape)} "
            f"and {list(anchors_MD.shape)}"
        )
    if len(anchors_MD) == 0:
        raise UserError("there are no anchors")
    width, raw = student_BE.shape[1], anchors_MD.shape[1]
    if weight_ED is None and width != raw:
        raise UserError(
            f"student embeddings are {width} wide and the anchors {raw}: "
            "raw teacher features need projection_weight_ED"
        )
    if weight_ED is not None and weight_ED.shape != (width, raw):
        raise UserError(
            f"projection_weight_ED is {list(weight_ED.shape)}, but student embeddings are {width} "
            f"wide and the anchors {raw}: it must be {[width, raw]}"
        )
    if bias_E is not None and weight_ED is None:
        raise UserError("projection_bias_E goes with projection_weight_ED, which is not given")
    if bias_E is not None and bias_E.shape != (width,):
        raise UserError(f"projection_bias_E is {list(bias_E.shape)}: it must be {[width]}")


def check_length(length: int, of: str, **tensors: Tensor | None) -> None:
    """Refuse tensors that do not hold one number for each of them."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape != (length,):
            raise UserError(f"{name} is {list(tensor.shape)}, but there are {length} {of}")
