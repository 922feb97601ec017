"""The protocol of scikit-learn's estimators, without scikit-learn."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, TypeVar

from ...errors import BadInput, nearest

__all__ = ["Estimator"]

Self = TypeVar("Self", bound="Estimator")


@dataclass(eq=False)
class Estimator:
    """A classifier whose parameters are the fields of a dataclass, and which is fitted once it has `classes_`."""

    _estimator_type = "classifier"

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The constructor's arguments by name."""
        return {one.name: getattr(self, one.name) for one in fields(self)}

    def set_params(self: Self, **params: Any) -> Self:
        """Set arguments of the constructor. Raises BadInput for unknown ones."""
        names = [one.name for one in fields(self)]
        for name, value in params.items():
            if name not in names:
                raise BadInput(f"{type(self).__name__} has no parameter {name!r}: {nearest(name, names)}")
            setattr(self, name, value)
        return self

    def __sklearn_clone__(self: Self) -> Self:
        """An unfitted copy, which shares the model."""
        return type(self)(**self.get_params())

    def __sklearn_is_fitted__(self) -> bool:
        """Whether `fit` was called."""
        return hasattr(self, "classes_")

    def __sklearn_tags__(self) -> Any:
        """What scikit-learn asks of an estimator from 1.6 on."""
        from sklearn.utils import ClassifierTags, InputTags, Tags, TargetTags

        return Tags(
            estimator_type="classifier", target_tags=TargetTags(required=True), transformer_tags=None,
            classifier_tags=ClassifierTags(), regressor_tags=None, input_tags=InputTags(three_d_array=True),
        )  # fmt: skip
