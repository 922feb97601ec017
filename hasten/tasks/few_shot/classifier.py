"""Few-shot classification by a diffusion model, in the manner of scikit-learn."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import BadInput, check_choice, check_int, check_number, nearest
from ...loading import load
from ...model.model import Model
from ...utils.random import Noise
from .adapters import ClassAdapters, layers_of
from .conditions import check_denoiser, class_conditions, prompts_or_labels
from .elimination import AllTimes, Decision, Elimination, PairedStop, Stages, eliminate
from .errors import ClassErrors
from .estimator import Estimator
from .fitting import AdapterTraining, steps_for_shots, train_adapters
from .shots import check_shots, images_for, samples_of
from .time_weights import attribute_size, evaluation_times, time_of_loss, time_step_weights

__all__ = ["DiffusionClassifier", "FewShotClassifier"]

PREDICTION = (
    "weights", "size", "step", "floor", "times", "spacing", "elimination", "error", "temperature", "lora_scale",
    "batch_size", "seed",
)  # fmt: skip
WEIGHTS = ("time_steps", "uniform", "inverse")
RULES = {"paired": PairedStop, "stages": Stages, "all": AllTimes}
RESOLUTION = 2000  # of the density from which times are drawn
DECODE = 64  # images that the autoencoder encodes at once


@dataclass(eq=False)
class FewShotClassifier(Estimator):
    """TiF learner: an adapter for each class, fitted on a few shots, and the class whose adapter denoises best.

        class = argmin_c sum_t w(t) || eps - eps_c(alpha x0 + sigma eps, t) ||^2,

    with the same noise for all classes, and weights w(t) that are high where noise has destroyed what tells the classes
    apart and not what merely goes with them in the shots, see `time_weights`. Parameters follow the protocol of
    scikit-learn's estimators: nothing is checked or loaded before `fit`; `clone` and `Pipeline` work.

    Args:
        model: a `Model`, or what `hasten.load` takes.
        rank: of the adapters (LoRA); 0: none.
        placement: of the adapters, `all` (as in the paper), `decoder` or `last`: the rest of the network runs once for
            all classes.
        targets: layers with adapters, see `nets.lora.target_layers`; None: attention where there is any, else all.
        condition: what the network is conditioned on. "none": no class, the empty prompt; "class": the class of the
            model that has the same name; another name of a class, or a prompt, is that of all images; a prompt with
            "{}" has the name of the class in its place. With `placement` "decoder" or "last" only the decoder gets
            the class.
        train_steps: of Adam; None: the paper's numbers by shots (`steps_for_shots`).
        lr: learning rate; None: 1e-4 for models with prompts, as in the paper, else 1e-3.
        shots_per_step: images of each class a step.
        prior_weight: of the loss on the model's own images (prior preservation); 0: without.
        prior_images: their number, of each class where conditions differ.
        lora_scale: multiplies the adapters' change in prediction; the paper has .6.
        weights: `time_steps`, the paper's w(t); `uniform`; `inverse`, 1 - w(t), a control that must fail.
        size: d of w(t); None: `attribute_size` of the shots.
        step: of the sizes of other attributes in w(t), see `time_step_weights`; None: d, so that w(t) is a function of
            the degree of loss alone, whatever the units and the size of the samples. The paper's is 1.
        floor: degree of loss l(t, d) below which times are left out, see `time_of_loss`.
        times: T, at which errors are compared.
        spacing: `even`, with weights w(t), or `weighted`: quantiles of the density w(t), without weights.
        elimination: `paired` (`PairedStop`), `stages` (`Stages`), `all`, or an `Elimination`.
        error: that `paired` promises: how often its answer may differ from that of `all`.
        temperature: of `predict_proba`.
        batch_size: samples times classes in the network at once.
        seed: of everything random.
        device: where a model is loaded that is given by name; None: the CPU.

    Attributes:
        classes_: (K,) sorted.
        size_: d. time_floor_: the smallest time. times_, weights_: (T,).
        adapters_: the factors of all classes. evaluations_: network evaluations an image of the last prediction, (n,).

    References:
        Yue, Zhou, Hong, Zhang, Sun 2024, arXiv:2403.02649.
    """

    model: Any
    rank: int = 8
    placement: str = "decoder"
    targets: Any = None
    condition: str = "none"
    train_steps: int | None = None
    lr: float | None = None
    shots_per_step: int = 4
    prior_weight: float = 1.0
    prior_images: int = 64
    lora_scale: float = 1.0
    weights: str = "time_steps"
    size: float | None = None
    step: float | None = None
    floor: float = 0.01
    times: int = 128
    spacing: str = "weighted"
    elimination: Any = "paired"
    error: float = 0.05
    temperature: float = 1.0
    batch_size: int = 128
    seed: int = 0
    device: Any = None

    # ---- fitting ----

    def fit(
        self, X: Any, y: Any, prior: Any = None, progress: Callable[[int, int], None] | None = None
    ) -> FewShotClassifier:
        """Fit an adapter for each class.

        Args:
            X: images (n, C, H, W) in [-1, 1] or uint8, arrays also (n, H, W, C), rows (n, C H W), or PIL images, of the
                model's size.
            y: n labels.
            prior: images of the prior, of any class; None: `prior_images` samples of the model.
            progress: called with (steps done, of how many).

        Raises:
            BadInput: for one class, two with the same picture, images of another size, and too many classes.
        """
        model = self._checked()
        images = images_for(model, X)
        classes, index = check_shots(images, y)
        self._set(model, classes)
        samples = torch.cat([samples_of(model, part) for part in images.split(DECODE)])
        self._set_times(samples, index)
        if not self.rank:
            return self
        layers = layers_of(model.denoiser, model.shape, self._common, self.placement, self.targets)
        adapters = ClassAdapters.start(model.denoiser.net, layers, len(classes), self.rank, self.seed)
        shots = [samples[(index == k).to(samples.device)] for k in range(len(classes))]
        steps = self.train_steps
        if steps is None:
            steps = steps_for_shots(round(len(images) / len(classes)))
        lr = self.lr
        if lr is None:
            lr = 1e-4 if model.conditioning is not None else 1e-3
        training = AdapterTraining(
            steps, lr, self.shots_per_step, self.prior_weight, self.time_floor_, float(self._high),
            self.seed, max(1, self.batch_size // self.shots_per_step),
        )  # fmt: skip
        errors = self._errors(adapters, 1.0)
        self.losses_: list[float] = train_adapters(errors, shots, self._prior(prior), training, progress)
        self.adapters_: ClassAdapters | None = adapters
        return self

    def _check(self) -> None:
        """Refuse parameters that cannot be."""
        check_choice("weights", self.weights, WEIGHTS)
        check_choice("spacing", self.spacing, ("even", "weighted"))
        for name, low in (("rank", 0), ("times", 2), ("batch_size", 1), ("prior_images", 0), ("seed", 0)):
            check_int(name, getattr(self, name), low)
        if check_number("temperature", self.temperature) <= 0:
            raise BadInput(f"the temperature must be positive, found {self.temperature}")
        self._rule()

    def _checked(self) -> Model:
        """The model, and the parameters checked."""
        self._check()
        model = self.model if isinstance(self.model, Model) else load(self.model, self.device)
        check_denoiser(model)
        return model

    def _rule(self) -> Elimination:
        """The rule of elimination."""
        if not isinstance(self.elimination, str):
            rule: Elimination = self.elimination
            return rule
        check_choice("elimination", self.elimination, RULES)
        return PairedStop(self.error) if self.elimination == "paired" else RULES[self.elimination]()

    def _set(self, model: Model, classes: np.ndarray) -> None:
        """Model, classes and their conditions."""
        self.model_, self.classes_ = model, classes
        self._common, self._own = class_conditions(model, self.condition, [str(one) for one in classes])
        self.n_features_in_ = math.prod(model.shape)
        self.adapters_ = None

    def _set_times(self, samples: Tensor | None, index: Tensor | None, size: float | None = None) -> None:
        """The size d, times and weights."""
        schedule = self.model_.denoiser.schedule
        self._high = schedule.t_max if not schedule.zero_snr else min(schedule.t_max, 0.999)
        size = self.size if size is None else size
        if size is None and samples is not None and index is not None:
            size = attribute_size(samples.cpu(), index)
        self.size_ = None if size is None else float(size)
        self.time_floor_ = time_of_loss(schedule, self.size_ or 0.0, self.floor)
        step = self.step if self.step is not None else self.size_ or 1.0

        def weights(t: Tensor) -> Tensor:
            if self.size_ is None or self.weights == "uniform":
                return torch.ones_like(t)
            w = time_step_weights(schedule, t, self.size_, step)
            return 1 - w if self.weights == "inverse" else w

        low = self.time_floor_
        if self.spacing == "even":
            self.times_ = evaluation_times(schedule, self.times, low)
            self.weights_ = weights(self.times_)
        else:
            fine = low + (torch.arange(RESOLUTION, dtype=torch.float64) + 0.5) / RESOLUTION * (self._high - low)
            self.times_ = evaluation_times(schedule, self.times, low, weights(fine), RESOLUTION)
            self.weights_ = torch.ones_like(self.times_)

    def _prior(self, images: Any) -> Tensor | None:
        """Samples of the prior (p, *S), or (K, p, *S) with conditions of the classes' own."""
        if not self.prior_weight or (images is None and not self.prior_images):
            return None
        model, K = self.model_, len(self.classes_)
        if images is not None:
            return samples_of(model, images_for(model, images, "prior"))
        labels = prompts_or_labels(model, self.condition, [str(one) for one in self.classes_])
        drawn = [
            samples_of(model, model.sample(self.prior_images, label, self.seed + k * self.prior_images))
            for k, label in enumerate(labels[:K])
        ]
        return drawn[0] if len(drawn) == 1 else torch.stack(drawn)

    def _errors(self, adapters: ClassAdapters | None, scale: float) -> ClassErrors:
        """The errors of all classes."""
        split = self.placement != "all" and adapters is not None
        return ClassErrors(self.model_.denoiser, adapters, self._common, self._own, scale, split)

    # ---- prediction ----

    def replace(self, **params: Any) -> FewShotClassifier:
        """A fitted copy with other parameters of prediction, which shares model and adapters.

        Args:
            params: such as weights, times, elimination: those that take effect after `fit`.

        Raises:
            BadInput: before `fit`, and for parameters of fitting.
        """
        self._fitted()
        for name in params:
            if name not in PREDICTION:
                raise BadInput(f"{name} takes effect in fit: {nearest(name, PREDICTION)} can be replaced")
        other = copy.copy(self).set_params(**params)
        other._check()
        if other.size_ is None and other.size is None and other.weights != "uniform":
            raise BadInput("weights by time need the size of the classes' attributes: give size")
        other._set_times(None, None, other.size if other.size is not None else self.size_)
        return other

    @torch.no_grad()
    def decide(self, X: Any, progress: Callable[[int, int], None] | None = None) -> Decision:
        """The class of each image, with the errors that it was found by and the evaluations that it took.

        Args:
            X: images, as for `fit`.
            progress: called with (evaluations done, at most how many).
        """
        self._fitted()
        model = self.model_
        images = images_for(model, X)
        samples = torch.cat([samples_of(model, part) for part in images.split(DECODE)])
        errors = self._errors(self.adapters_, self.lora_scale)
        noise = Noise(range(self.seed, self.seed + self.times), model.shape, torch.float32, model.device).initial()
        most = len(images) * len(self.classes_) * self.times

        def evaluate(some: Tensor, classes: Tensor, times: Tensor) -> Tensor:
            n, m = len(some), len(times)
            rows, places = some.repeat_interleave(m), times.repeat(n)
            at_once = max(1, self.batch_size // len(classes))
            parts = []
            for row, place in zip(rows.split(at_once), places.split(at_once)):
                x0, eps, t = samples[row.to(samples.device)], noise[place.to(noise.device)], self.times_[place]
                each = [errors(x0, eps, t, some_classes) for some_classes in classes.split(self.batch_size)]
                parts.append(torch.cat(each).double().cpu() * self.weights_[place])
                if progress is not None:
                    progress(min(errors.evaluations, most), most)
            return torch.cat(parts, 1).reshape(len(classes), n, m)

        decision = eliminate(evaluate, len(images), len(self.classes_), self.times, self._rule(), self.seed)
        if not bool(decision.errors.nan_to_num(0.0).isfinite().all()):
            raise BadInput(f"{model.name} gives errors that are not finite")
        self.evaluations_ = decision.evaluations.numpy()
        if progress is not None:
            progress(most, most)
        return decision

    def predict(self, X: Any) -> np.ndarray:
        """The class of each image (n,)."""
        self._fitted()
        predicted: np.ndarray = self.classes_[self.decide(X).winner.numpy()]
        return predicted

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities (n, K), in the order of `classes_`; see `probabilities`."""
        self._fitted()
        return self.probabilities(self.decide(X))

    def probabilities(self, decision: Decision) -> np.ndarray:
        """Softmax of minus the mean paired difference of each class to the winner, in standard errors of that mean,
        over the times before it was eliminated. A measure of how sure the comparison is; it is not calibrated.

        Args:
            decision: of `decide`.
        """
        errors = decision.errors
        difference = errors - errors[torch.arange(len(errors)), decision.winner][:, None]
        count = (~difference.isnan()).sum(2).clamp(min=1)
        mean = difference.nanmean(2)
        variance = (difference - mean[..., None]).square().nansum(2) / (count - 1).clamp(min=1)
        deviation = (variance / count).sqrt()
        logits = torch.where(mean > 0, -mean / deviation.clamp(min=1e-30), 0.0) / self.temperature
        return torch.softmax(logits, 1).numpy()

    def score(self, X: Any, y: Any) -> float:
        """The fraction of images whose predicted class is that of `y`."""
        labels = np.asarray(y.cpu() if isinstance(y, Tensor) else y)
        predicted = self.predict(X)
        if labels.shape != predicted.shape:
            raise BadInput(f"y must have one label for each of the {len(predicted)} images, found {labels.shape}")
        return float((predicted == labels).mean())

    def _fitted(self) -> None:
        """Raises BadInput before `fit`."""
        if not self.__sklearn_is_fitted__():
            raise BadInput(f"this {type(self).__name__} is not fitted: call fit first")


@dataclass(eq=False)
class DiffusionClassifier(FewShotClassifier):
    """Diffusion Classifier: the class or prompt under which the model denoises an image best; no adapters, no weights.

    `fit(X, y)` only notes which classes there are: X may be None. They must be classes of the model, or, for a model
    with prompts, fit into `condition`, such as "a photo of a {}".

    References:
        Li, Prabhudesai, Duggal, Brown, Pathak 2023, arXiv:2303.16203.
    """

    rank: int = 0
    condition: str = "class"
    weights: str = "uniform"
    spacing: str = "even"

    def fit(
        self, X: Any, y: Any = None, prior: Any = None, progress: Callable[[int, int], None] | None = None
    ) -> DiffusionClassifier:
        """Note the classes.

        Args:
            X: not used, unless weights or adapters need it.
            y: labels; None: all classes of the model.
            prior: as in `FewShotClassifier.fit`.
            progress: as there.
        """
        if self.rank or self.weights != "uniform":
            super().fit(X, y, prior, progress)
            return self
        model = self._checked()
        known = model.classes if y is None else (y.cpu() if isinstance(y, Tensor) else y)
        if known is None:
            raise BadInput(f"{model.name} has no list of classes: give y, the classes")
        classes = np.unique(np.asarray(known))
        if len(classes) < 2:
            raise BadInput(f"classification needs two classes or more, found {len(classes)}")
        self._set(model, classes)
        self._set_times(None, None)
        return self
