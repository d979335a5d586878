"""Plain regression onto the teacher's features: the baseline of every feature distillation."""

from collections.abc import Callable

import torch

from gacd.losses.soft_labels import feature_regression
from gacd.methods.base import Given, Reweight, Step, Term
from gacd.models.base import Backbone
from gacd.models.projection import Projection
from gacd.shapes import Images, Logits, PerSample


class Regression(Term):
    """beta mean_e (P f_s(x') - f_t(x))_e^2, P linear, trained along; x' scatters the features.

    FitNets' hint (Romero et al. 2015, Eq. 3) at the penultimate layer, on attacked images; beta is
    that of CRD's benchmark for FitNets (at 1 the digits' student learns the mean feature and no
    more). The student's head is fitted afterwards; until then the teacher's head reads P f_s.
    """

    objective = "transport"
    needs_teacher = True
    trains_head = False

    def __init__(self, given: Given, *, beta: float = 100.0, reweight: Reweight = "none") -> None:
        super().__init__(given, reweight=reweight)
        assert given.teacher is not None
        self.beta = beta
        self.teacher = given.teacher
        width = given.teacher.module.num_features
        self.projection = Projection(given.student.num_features, width, seed=given.seed).linear

    def losses(self, step: Step) -> PerSample:
        """The attacked student's projected features against the teacher's clean ones."""
        features, seen = step.student_adv_features, step.teacher_features  # of the autocast
        with torch.autocast(features.device.type, enabled=False):
            return self.beta * feature_regression(self.projection(features.float()), seen)

    def predictor(self, student: Backbone) -> Callable[[Images], Logits]:
        """The teacher's head on the student's projected features."""
        head = self.teacher.module.forward_head
        return lambda x: head(self.projection(student.forward_features(x)))
