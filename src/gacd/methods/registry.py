"""Every method by its name, what a name such as `gacd+rslad+aft` means, and names from outside."""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import nn

from gacd.anchors import AnchorBank
from gacd.errors import UserError, defined_again, unknown
from gacd.methods.adaad import AdaAD
from gacd.methods.ard import ARD
from gacd.methods.awp import AWP, NO_AWP
from gacd.methods.base import OBJECTIVES, Given, Teacher, Term, TrainingAttack
from gacd.methods.crd import CRD
from gacd.methods.gacd import GACD
from gacd.methods.iad import IAD
from gacd.methods.igdm import IGDM
from gacd.methods.kd import KD
from gacd.methods.mart import MART
from gacd.methods.method import Method
from gacd.methods.natural import Natural
from gacd.methods.pgd_at import PGDAT
from gacd.methods.regression import Regression
from gacd.methods.rslad import RSLAD
from gacd.methods.rst import RST
from gacd.methods.trades import TRADES
from gacd.models.base import Backbone, check_backbone

METHODS: dict[str, type[Term]] = {
    "natural": Natural,
    "pgd-at": PGDAT,
    "trades": TRADES,
    "mart": MART,
    "rst": RST,
    "kd": KD,
    "ard": ARD,
    "rslad": RSLAD,
    "iad": IAD,
    "adaad": AdaAD,
    "igdm": IGDM,
    "regression": Regression,
    "crd": CRD,
    "gacd": GACD,
}
"""Every method by its name on the command line."""

AFT = "aft"
RESERVED = (
    "out", "seed", "data", "threat", "evaluation", "fabric", "teacher", "student", "methods",
    "weights", "bank", "training", "distillation", "finetune", "finetune_method", "linear_select",
    "extra", "config", "source", "finetuned", "transfer", "unlabelled", "model", "method",
    "checkpoint", "mean", "std", "num_classes", "source_model", "source_mean", "source_std",
)  # fmt: skip
"""Names of a run's settings, and of its other folders: no method can bear them."""
_PLAIN = {key: kind for kind in (bool, int, float, str) for key in (kind, kind.__name__)}


def register_method(name: str, term: type[Term]) -> None:
    """Make `term` a method of that name, on the command line as well: see docs/methods.md.

    Raises:
        UserError: the name is another method's, or cannot be one; `term` is no class of terms,
            names no objective of an attack, or has a setting without a default.
    """
    if not (isinstance(term, type) and issubclass(term, Term)):
        raise UserError(f"'{name}': a method is a class derived from gacd.methods.Term")
    if term.objective is not None and term.objective not in OBJECTIVES[1:]:
        raise unknown(f"objective of '{name}'", term.objective, OBJECTIVES[1:])
    if term.needs_bank and not term.needs_teacher:
        raise UserError(f"'{name}': a bank is the teacher's features: say needs_teacher = True")
    for setting in _settings(term).values():
        named = setting.kind not in (setting.VAR_POSITIONAL, setting.VAR_KEYWORD)
        if named and setting.default is setting.empty:
            raise UserError(f"'{name}': give the setting {setting.name} a default")
    if name == AFT or (name in METHODS and not defined_again(METHODS[name], term)):
        raise UserError(f"the method '{name}' exists already: register yours under another name")
    if name in RESERVED:
        raise UserError(f"'{name}' is a setting, or a folder of a run: register another name")
    if not name.replace("-", "").replace("_", "").isalnum():
        raise UserError(f"'{name}' cannot name a method: use letters, digits, - and _ alone")
    if hasattr(nn.ModuleDict(), name):  # such as half, train, values
        raise UserError(f"'{name}' is a name of PyTorch's own: register another name")
    METHODS[name] = term


class Named(NamedTuple):
    """What a name means: the terms whose weights are not 0, in order, and whether aft follows."""

    name: str
    """Without +aft."""
    terms: tuple[str, ...]
    aft: bool

    @property
    def classes(self) -> list[type[Term]]:
        """The terms' classes."""
        return [METHODS[term] for term in self.terms]

    @property
    def needs_teacher(self) -> bool:
        """Whether any term does."""
        return any(term.needs_teacher for term in self.classes)

    @property
    def needs_bank(self) -> bool:
        """Whether any term does."""
        return any(term.needs_bank for term in self.classes)

    @property
    def trains_head(self) -> bool:
        """Whether any term does."""
        return any(term.trains_head for term in self.classes)

    @property
    def attacks(self) -> bool:
        """Whether any term looks at attacked images."""
        return any(term.objective is not None for term in self.classes)


def parse_method(name: str, weights: Mapping[str, float] | None = None) -> Named:
    """`gacd+rslad+aft` as its terms; those that `weights` sets to 0 are left out of a combination.

    Raises:
        UserError: an unknown term (the nearest one is named), a term twice, an addition alone,
            every weight 0, or aft after terms that need no teacher.
    """
    parts = name.split("+")
    aft = len(parts) > 1 and parts[-1] == AFT
    terms = parts[:-1] if aft else parts
    for term in terms:
        if term not in METHODS:
            raise unknown("method", term, METHODS)
        if terms.count(term) > 1:
            raise UserError(f"method '{name}' names {term} twice")
    for term in weights or {}:
        if term not in METHODS:
            raise unknown("method in weights", term, METHODS)
    if len(terms) > 1:
        kept = tuple(term for term in terms if (weights or {}).get(term, 1.0) != 0)
        if not kept:
            raise UserError(f"method '{name}': every weight is 0")
    else:
        kept = (terms[0],)
    named = Named("+".join(terms), kept, aft)
    rest = [term for term in named.classes if not term.is_addition]
    if not rest:
        raise UserError(f"'{kept[0]}' is an addition to other methods: say rslad+{kept[0]}")
    if len(rest) < len(kept) and not any(term.trains_head for term in rest):
        raise UserError(
            f"'{name}': an addition compares the head's answers, and no other term trains the "
            "head: add one that does, such as rslad"
        )
    if aft and not named.needs_teacher:
        raise UserError(f"'{name}': aft follows methods with a teacher, such as gacd+aft")
    return named


def _settings(term: type[Term]) -> dict[str, inspect.Parameter]:
    """What a term takes after what it is built around."""
    return dict([*inspect.signature(term).parameters.items()][1:])


def check_settings(term: str, settings: Mapping[str, Any]) -> None:
    """Refuse a setting that the method does not have, or a value of another type than it says."""
    if term not in METHODS:
        raise unknown("method", term, METHODS)
    known = _settings(METHODS[term])
    for setting, value in settings.items():
        if setting not in known:
            raise unknown(f"setting of {term}", setting, known)
        kind = _PLAIN.get(known[setting].annotation)
        if kind is None:
            continue
        accepted = (int, float) if kind is float else kind
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
            raise UserError(f"{term}.{setting} is '{value}', but must be of type {kind.__name__}")


def method_order(names: Iterable[str]) -> list[str]:
    """Names in the order of `METHODS`, a combination after its first term; others at the end."""
    rank = {name: i for i, name in enumerate(METHODS)}

    def key(name: str) -> tuple[list[int], str]:
        return [rank.get(part, -1 if part == AFT else len(rank)) for part in name.split("+")], name

    return sorted(names, key=key)


def create_method(
    name: str,
    student: Backbone,
    attack: TrainingAttack,
    *,
    teacher: Teacher | None = None,
    bank: AnchorBank | None = None,
    seed: int = 0,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    weights: Mapping[str, float] | None = None,
    awp: AWP = NO_AWP,
) -> Method:
    """The named method around `student`; `options` are those of each term, by its name.

    `weights` are those of a combination's terms, by name; they leave methods of one term alone.

    Raises:
        UserError: an unknown method or option, or no teacher or anchor bank where one is needed.
    """
    named = parse_method(name, weights)
    if named.aft:
        raise UserError(
            f"'{name}' is several stages: fit '{named.name}', then its head if it trains none "
            "(gacd.linear.fit_head), then pgd-at"
        )
    for term in options or {}:
        if term not in METHODS:
            raise unknown("method in options", term, METHODS)
    check_backbone(student)
    if teacher is not None and not isinstance(teacher, Teacher):
        raise UserError("the teacher must be a gacd.methods.Teacher: Teacher(network)")
    if named.needs_teacher and teacher is None:
        raise UserError(f"{name} needs a teacher: use gacd distill")
    if named.needs_bank and bank is None:
        raise UserError(f"{name} needs an anchor bank of the teacher's features")
    given = Given(student, teacher, bank, seed)
    terms: dict[str, Term] = {}
    made_of: dict[str, Any] = {}
    for term in named.terms:
        settings = (options or {}).get(term, {})
        check_settings(term, settings)
        terms[term] = METHODS[term](given, **settings)
        defaults = {key: value.default for key, value in _settings(METHODS[term]).items()}
        made_of |= {f"{term}.{key}": value for key, value in (defaults | dict(settings)).items()}
    combined = weights if "+" in named.name else None
    return Method(
        student, attack, terms, weights=combined, teacher=teacher,
        bank=bank if named.needs_bank else None, awp=awp,
        settings={k: v for k, v in made_of.items() if isinstance(v, int | float | str)},
    )  # fmt: skip
