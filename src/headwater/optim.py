"""Optimizer settings as values. The arithmetic itself is in the kernels; nothing here touches an array.

Names, defaults and formulas are those of `torch.optim`; with `keras_form` the formulas are Keras's. Some settings shape the state
(which slots there are) or the kernel, and stay as registered; the others are *scalars*, travel with every push and may change by the
step. `row` turns the scalars into what the kernel takes, in float64 and in one place, so that every server computes with the same
numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, TypeAlias

import msgspec

from headwater._errors import SettingError

# Flags of the kernels; the same numbers stand in passes.h.
_MOMENTUM, _NESTEROV, _CENTERED, _AMSGRAD = 1, 2, 2, 1

_MANY = math.inf
#: Scalar → (lowest, highest) value; highest itself is refused for betas and for whatever has no highest value.
_RANGES = {
    "lr": (0.0, _MANY),
    "lr_decay": (0.0, _MANY),
    "momentum": (0.0, _MANY),
    "dampening": (-_MANY, _MANY),
    "weight_decay": (0.0, _MANY),
    "eps": (0.0, _MANY),
    "alpha": (0.0, math.nextafter(1.0, 2.0)),
    "beta1": (0.0, 1.0),
    "beta2": (0.0, 1.0),
    "initial_accumulator_value": (0.0, _MANY),
    "beta": (0.0, _MANY),
    "l1": (0.0, _MANY),
    "l2": (0.0, _MANY),
}


class Optimizer(msgspec.Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    """Base of all optimizers. A value: it can be compared, sent and shared."""

    #: The kernel's name for it.
    kind: ClassVar[str]
    #: The settings that may change by the step, in the order in which they travel.
    scalar_names: ClassVar[tuple[str, ...]] = ()
    is_for_tables: ClassVar[bool] = False  # and not for tensors

    def __post_init__(self) -> None:
        for field in msgspec.structs.fields(self):
            value = getattr(self, field.name)
            if field.type in ("float", float):  # a NumPy number does not travel, a float does
                msgspec.structs.force_setattr(self, field.name, _number(self, field.name, value))
            elif field.type in ("bool", bool) and not isinstance(value, bool):
                raise SettingError(f"Expected {field.name} to be True or False, got {value!r} — {self._name}.")
        for name, value in self.scalars().items():
            _check_range(self, name, value)

    @property
    def _name(self) -> str:
        return type(self).__name__

    @property
    def flags(self) -> int:
        """What the kernel must know besides its name."""
        return 0

    @property
    def slots(self) -> tuple[str, ...]:
        """State planes besides the parameters, by the names that torch.optim gives them."""
        return ()

    def initial(self, slot: str) -> float:
        """Return what a slot holds before the first step."""
        if slot not in self.slots:
            raise SettingError(
                f"Expected one of the slots {', '.join(self.slots) or '(none)'}, got {slot!r} — {self._name}."
            )
        return 0.0

    def scalars(self) -> dict[str, float]:
        """Return the settings that may change by the step."""
        return {name: float(getattr(self, name)) for name in self.scalar_names}

    def row(self, scalars: Mapping[str, float], step: int) -> list[float]:
        """Return the kernel's scalars for a tensor's step number `step`, counted from 1; a tensor not yet touched counts as at 1."""
        raise NotImplementedError

    def check(self, scalars: Mapping[str, float]) -> None:
        """Raise SettingError unless these scalars, all of them, can stand in for the registered ones."""
        if set(scalars) != set(self.scalars()):
            raise SettingError(
                f"Expected the scalars {', '.join(self.scalars()) or '(none)'}, got {', '.join(scalars) or '(none)'} — {self._name}."
            )
        for name, value in scalars.items():
            _check_range(self, name, value)

    def structure(self) -> tuple[Any, ...]:
        """Return what must be equal at every worker: everything but the scalars."""
        return (self.kind, self.flags)

    def row_slots(self, dim: int) -> list[float]:
        """Return the state that a new row of `dim` values begins with in a table; SettingError for what tables do not have."""
        raise SettingError(
            f"Expected SGD, Adagrad, RowwiseAdagrad, Adam or FTRL for a table, got {self._name}: give the table one of these."
        )

    def check_dense(self) -> None:
        """Raise SettingError unless tensors can have it."""
        if self.is_for_tables:
            raise SettingError(
                f"Expected an optimizer of tensors, got {self._name}, of tables only: take Adagrad instead."
            )


class _Descent(Optimizer, frozen=True, kw_only=True):
    """An optimizer that follows the gradient: what all but Mean share."""

    maximize: bool = False
    clip_norm: float | None = None  # limit of the global norm of the aggregated gradient

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clip_norm is not None:
            limit = _number(self, "clip_norm", self.clip_norm)
            if not 0.0 < limit < math.inf:
                raise SettingError(
                    f"Expected clip_norm above 0, or None for no limit, got {self.clip_norm} — {self._name}."
                )
            msgspec.structs.force_setattr(self, "clip_norm", limit)

    def structure(self) -> tuple[Any, ...]:
        return (*super().structure(), self.maximize, self.clip_norm)

    def _plain_row(self, slots: list[float], **others: object) -> list[float]:
        """Return the slots, or raise SettingError for settings that tables do not have."""
        found = {"maximize": self.maximize, "clip_norm": self.clip_norm} | others
        wrong = ", ".join(f"{name}={value}" for name, value in found.items() if value)
        if wrong:
            raise SettingError(f"Expected {self._name} without {wrong} for a table: leave it out.")
        return slots


class _Momentum(_Descent, frozen=True, kw_only=True):
    """What SGD and RMSprop share: without momentum there is no slot for it."""

    momentum: float = 0.0

    @property
    def has_momentum(self) -> bool:
        """Whether there is a momentum buffer."""
        return self.momentum != 0.0

    def check(self, scalars: Mapping[str, float]) -> None:
        super().check(scalars)
        if (scalars["momentum"] != 0.0) != self.has_momentum:
            kept = "above 0" if self.has_momentum else "0"
            raise SettingError(
                f"Expected momentum to stay {kept}, as registered, got {scalars['momentum']} — {self._name}: "
                "with and without momentum there are different planes of state."
            )


class SGD(_Momentum, frozen=True, kw_only=True):
    """Stochastic gradient descent, with momentum or Nesterov's momentum."""

    kind: ClassVar[str] = "sgd"
    scalar_names: ClassVar[tuple[str, ...]] = ("lr", "momentum", "dampening", "weight_decay")

    lr: float = 1e-3
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    keras_form: bool = False  # the buffer sums lr·g, so that a new rate leaves what is in it

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_nesterov(self.scalars())

    @property
    def flags(self) -> int:
        return _MOMENTUM * self.has_momentum | _NESTEROV * self.nesterov

    @property
    def slots(self) -> tuple[str, ...]:
        return ("momentum_buffer",) if self.has_momentum else ()

    def structure(self) -> tuple[Any, ...]:
        return (*super().structure(), self.keras_form)

    def check(self, scalars: Mapping[str, float]) -> None:
        super().check(scalars)
        self._check_nesterov(scalars)

    def _check_nesterov(self, scalars: Mapping[str, float]) -> None:
        if self.nesterov and (scalars["momentum"] == 0.0 or scalars["dampening"] != 0.0):
            raise SettingError(
                f"Expected momentum above 0 and dampening 0 for Nesterov's momentum, got momentum {scalars['momentum']} "
                f"and dampening {scalars['dampening']} — SGD."
            )

    def row_slots(self, dim: int) -> list[float]:
        return self._plain_row([], momentum=self.momentum, keras_form=self.keras_form)

    def row(self, scalars: Mapping[str, float], step: int) -> list[float]:
        if self.keras_form and self.has_momentum:
            return [1.0, scalars["weight_decay"], scalars["momentum"], scalars["lr"]]
        # torch.optim starts the buffer with the first gradient itself: 0·momentum + 1·gradient.
        fresh = 1.0 if step <= 1 else 1.0 - scalars["dampening"]
        return [scalars["lr"], scalars["weight_decay"], scalars["momentum"], fresh]


class Adagrad(_Descent, frozen=True, kw_only=True):
    """Adagrad (Duchi et al., 2011)."""

    kind: ClassVar[str] = "adagrad"
    scalar_names: ClassVar[tuple[str, ...]] = ("lr", "lr_decay", "weight_decay", "eps")

    lr: float = 1e-2
    lr_decay: float = 0.0
    weight_decay: float = 0.0
    initial_accumulator_value: float = 0.0
    eps: float = 1e-10

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_range(self, "initial_accumulator_value", self.initial_accumulator_value)

    @property
    def slots(self) -> tuple[str, ...]:
        return ("sum",)

    def initial(self, slot: str) -> float:
        return super().initial(slot) + self.initial_accumulator_value

    def structure(self) -> tuple[Any, ...]:
        return (*super().structure(), self.initial_accumulator_value)

    def row_slots(self, dim: int) -> list[float]:
        return self._plain_row([self.initial_accumulator_value] * dim)

    def row(self, scalars: Mapping[str, float], step: int) -> list[float]:
        rate = scalars["lr"] / (1.0 + (max(step, 1) - 1) * scalars["lr_decay"])
        return [rate, scalars["weight_decay"], scalars["eps"]]


class RMSprop(_Momentum, frozen=True, kw_only=True):
    """RMSprop (Hinton, 2012); centered as in Graves (2013)."""

    kind: ClassVar[str] = "rmsprop"
    scalar_names: ClassVar[tuple[str, ...]] = ("lr", "alpha", "eps", "weight_decay", "momentum")

    lr: float = 1e-2
    alpha: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.0
    centered: bool = False
    keras_form: bool = False  # eps stands within the root, and momentum is as in SGD

    @property
    def flags(self) -> int:
        return _MOMENTUM * self.has_momentum | _CENTERED * self.centered

    def structure(self) -> tuple[Any, ...]:
        return (*super().structure(), self.keras_form)

    @property
    def slots(self) -> tuple[str, ...]:
        # The kernel's order.
        return ("square_avg", *("grad_avg",) * self.centered, *("momentum_buffer",) * self.has_momentum)

    def row(self, scalars: Mapping[str, float], step: int) -> list[float]:
        lr, decay, alpha, eps = (scalars[name] for name in ("lr", "weight_decay", "alpha", "eps"))
        outer, inner = (0.0, eps) if self.keras_form else (eps, 0.0)
        rate, gain = (1.0, lr) if self.keras_form and self.has_momentum else (lr, 1.0)
        return [rate, decay, alpha, 1.0 - alpha, outer, scalars["momentum"], inner, gain]


class Adam(_Descent, frozen=True, kw_only=True):
    """Adam (Kingma and Ba, 2015); amsgrad as in Reddi et al. (2018). Weight decay is added to the gradient."""

    kind: ClassVar[str] = "adam"
    scalar_names: ClassVar[tuple[str, ...]] = ("lr", "beta1", "beta2", "eps", "weight_decay")

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    amsgrad: bool = False
    keras_form: bool = (
        False  # eps is the "epsilon hat" of Kingma and Ba, section 2 at the end: added before the correction
    )

    def __post_init__(self) -> None:
        try:
            first, second = self.betas
        except (TypeError, ValueError):
            raise SettingError(f"Expected two betas, got {self.betas!r} — {self._name}.") from None
        betas = (_number(self, "beta1", first), _number(self, "beta2", second))
        msgspec.structs.force_setattr(self, "betas", betas)
        super().__post_init__()

    @property
    def flags(self) -> int:
        return _AMSGRAD * self.amsgrad

    @property
    def slots(self) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq", *("max_exp_avg_sq",) * self.amsgrad)

    def structure(self) -> tuple[Any, ...]:
        return (*super().structure(), self.keras_form)

    @property
    def beta1(self) -> float:
        """Decay of the gradient's mean."""
        return self.betas[0]

    @property
    def beta2(self) -> float:
        """Decay of the squared gradient's mean."""
        return self.betas[1]

    def row_slots(self, dim: int) -> list[float]:
        return self._plain_row([0.0] * (2 * dim), amsgrad=self.amsgrad, keras_form=self.keras_form)

    def row(self, scalars: Mapping[str, float], step: int) -> list[float]:
        # Kingma and Ba, section 2 at the end: the corrections folded into the step size and the denominator.
        lr, beta1, beta2 = scalars["lr"], scalars["beta1"], scalars["beta2"]
        step = max(step, 1)
        step_size = lr / (1.0 - beta1**step)
        correction = math.sqrt(1.0 - beta2**step)
        decay = self._decay(lr, scalars["weight_decay"])
        eps = scalars["eps"] / correction if self.keras_form else scalars["eps"]
        return [step_size, decay, 1.0 - beta1, beta2, 1.0 - beta2, correction, eps]

    def _decay(self, lr: float, weight_decay: float) -> float:
        """Return what multiplies the parameter where it is added to the gradient."""
        return weight_decay


class AdamW(Adam, frozen=True, kw_only=True):
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019)."""

    kind: ClassVar[str] = "adamw"

    weight_decay: float = 1e-2

    def row_slots(self, dim: int) -> list[float]:
        return Optimizer.row_slots(self, dim)

    def _decay(self, lr: float, weight_decay: float) -> float:
        """Return what is kept of the parameter."""
        return 1.0 - lr * weight_decay


class Mean(Optimizer, frozen=True, kw_only=True):
    """No optimizer: the server keeps the mean gradient, and the optimizer runs on the workers."""

    kind: ClassVar[str] = "mean"

    def row(self, scalars: Mapping[str, float], step: int) -> list[float]:
        return []


class RowwiseAdagrad(Adagrad, frozen=True, kw_only=True):
    """Adagrad with one accumulator a row, the mean of its squared gradients; of tables only.

    It keeps 4 bytes of state a row instead of 4 a value.
    """

    kind: ClassVar[str] = "rowwise_adagrad"
    is_for_tables: ClassVar[bool] = True

    def row_slots(self, dim: int) -> list[float]:
        return self._plain_row([self.initial_accumulator_value])


class FTRL(_Descent, frozen=True, kw_only=True):
    """Follow the regularised leader (McMahan et al., 2013, algorithm 1), the rate per value ∝ 1/√Σg²; of tables only.

    The value follows from the state: what a row began with matters only for its first gradient.
    """

    kind: ClassVar[str] = "ftrl"
    is_for_tables: ClassVar[bool] = True
    scalar_names: ClassVar[tuple[str, ...]] = ("lr", "beta", "l1", "l2")

    lr: float = 0.1
    beta: float = 1.0
    l1: float = 0.0
    l2: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_lr(self.lr)

    def check(self, scalars: Mapping[str, float]) -> None:
        super().check(scalars)
        self._check_lr(scalars["lr"])

    def _check_lr(self, lr: float) -> None:
        if lr == 0.0:
            raise SettingError("Expected lr above 0, got 0.0 — FTRL divides by it.")

    def row_slots(self, dim: int) -> list[float]:
        return self._plain_row([0.0] * (2 * dim))

    def row(self, scalars: Mapping[str, float], step: int) -> list[float]:
        return [scalars["lr"], scalars["beta"], scalars["l1"], scalars["l2"]]


#: What tensors can have, and what tables can have.
AnyOptimizer: TypeAlias = SGD | Adagrad | RMSprop | Adam | AdamW | Mean
RowOptimizer: TypeAlias = SGD | Adagrad | RowwiseAdagrad | Adam | FTRL


def _number(optimizer: Optimizer, name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise SettingError(f"Expected {name} to be a number, got {value!r} — {type(optimizer).__name__}.") from None


def _check_range(optimizer: Optimizer, name: str, value: float) -> None:
    low, limit = _RANGES[name]
    if not (math.isfinite(value) and low <= value < limit):
        wanted = (
            "a finite number" if low < 0 else f"{low:g} or more" if limit == _MANY else f"from {low:g} to {limit:g}"
        )
        if limit == 1.0:
            wanted += ", 1 itself not included"
        raise SettingError(f"Expected {name} {wanted}, got {value} — {type(optimizer).__name__}.")
