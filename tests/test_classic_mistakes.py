"""Tests of the tests: each mistake that published codes of these methods have made, planted here, makes a test fail."""

import __future__

import inspect
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import test_compared_methods as compared
import test_losses_classifiers as classifiers
import test_losses_consistency as views
import test_losses_discrepancy as discrepancy
import test_losses_norms as norms
import test_losses_predictions as predictions
import test_losses_prototypes as prototypes
import test_shallow as shallow

from gsda_fast import losses
from gsda_fast.losses.discrepancy import _gaussian_kernels
from gsda_fast.losses.prototypes import _scores
from gsda_fast.methods import TERMS
from gsda_fast.methods.adda import FrozenCopy
from gsda_fast.methods.adversarial import DomainAdversarial
from gsda_fast.methods.cdan import CDAN
from gsda_fast.methods.fixmatch import FixMatch
from gsda_fast.methods.heads import TwoClassifiers
from gsda_fast.methods.jan import JAN
from gsda_fast.methods.mada import MADA
from gsda_fast.methods.mdd import MDD
from gsda_fast.methods.objective import classification_loss
from gsda_fast.methods.rtn import RTN
from gsda_fast.methods.sdat import SDAT
from gsda_fast.methods.self_ensembling import SelfEnsembling
from gsda_fast.methods.shallow import tca
from gsda_fast.methods.symnets import SymNets
from gsda_fast.methods.tpn import TPN


@dataclass(frozen=True)
class Mistake:
    """A mistake in a function, or in a method of a class, and the test that sees it.

    Attributes:
        where: the function. changes: what stands there, once, and what a wrong code has in its place.
        seen_by: the test. arguments: of the test; its fixture monkeypatch it gets in any case.
        owner: the class, of a method.
    """

    where: Callable[..., Any]
    changes: dict[str, str]
    seen_by: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    owner: type | None = None


def of(owner: type, name: str, changes: dict[str, str], seen_by: Callable[..., Any], *arguments: Any) -> Mistake:
    return Mistake(vars(owner)[name], changes, seen_by, arguments, owner)


MISTAKES = {
    # CDAN+E, MADA
    "entropy weights over both domains together": of(
        CDAN,
        "_weights",
        {"[raw[:num_source].mean(), raw[num_source:].mean()]": "[raw.mean(), raw.mean()]"},
        compared.test_published_gradient_through_cdans_weights,
    ),
    "reversal forgotten on the entropy weights": of(
        DomainAdversarial,
        "played",
        {"scale_gradient(logits, against)": "logits"},
        compared.test_published_gradient_through_cdans_weights,
    ),
    "CDAN's conditions carry a gradient": of(
        CDAN,
        "judge",
        {"logits.detach()": "logits"},
        compared.test_probabilities_that_condition_are_constants,
        "cdan",
    ),
    "MADA's conditions carry a gradient": of(
        MADA,
        "judge",
        {"logits.detach()": "logits"},
        compared.test_probabilities_that_condition_are_constants,
        "mada",
    ),
    "MADA weighs the logits, not the input": of(
        MADA,
        "judge",
        {"(features, probabilities, frozen)": "(features, None, frozen) * probabilities"},
        compared.test_published_digits_of_mada,
    ),
    # HAFN, SAFN, BSP
    "HAFN of each sample": Mistake(
        losses.hard_feature_norm,
        {
            "torch.linalg.vector_norm(features, dim=1).mean() - radius": (
                "(torch.linalg.vector_norm(features, dim=1) - radius).square().mean()"
            ),
            "gaps[0].square() + gaps[1].square()": "gaps[0] + gaps[1]",
        },
        norms.test_hard_norm_squares_the_gap_of_the_mean,
    ),
    "SAFN's radius is not held": Mistake(
        losses.stepwise_feature_norm, {"norms.detach()": "norms"}, norms.test_stepwise_norm_cannot_be_lowered
    ),
    "BSP of the batch of one rank": Mistake(
        TERMS["bsp"],
        {
            "step.gather(outputs.source_features), step.gather(outputs.target_features)": (
                "outputs.source_features, outputs.target_features"
            )
        },
        compared.test_two_ranks_are_one,
        ("bsp-cdan",),
    ),
    "BSP grows with the batch": Mistake(
        TERMS["bsp"], {"BSP_BATCH / len(rows)": "1"}, compared.test_bsp_is_the_authors_penalty_at_their_batch
    ),
    # Self-ensembling, FixMatch
    "the student teaches itself": of(
        SelfEnsembling,
        "updates",
        {"self.model(batch.further_views[0]).logits": "outputs.target_logits"},
        compared.test_published_digits_of_self_ensembling,
    ),
    "the teacher follows at once": of(
        SelfEnsembling,
        "_average",
        {"1 - self.settings": "self.settings"},
        compared.test_the_teacher_is_the_running_mean_of_the_student,
    ),
    "a sum over classes": Mistake(
        losses.consistency, {".mean(1)": ".sum(1)"}, views.test_consistency_is_the_literal_formula
    ),
    "a mean over the rows that are kept": Mistake(
        losses.confident_cross_entropy,
        {
            "(confident_rows(weak_logits, threshold) * each).mean()": (
                "each[confident_rows(weak_logits, threshold) > 0].mean()"
            )
        },
        views.test_fixmatch_is_the_literal_formula,
    ),
    "softmax twice in the consistency": Mistake(
        losses.consistency,
        {"F.softmax(student_logits, dim=1)": "F.softmax(student_logits, dim=1).softmax(1)"},
        views.test_consistency_is_the_literal_formula,
    ),
    "softmax twice in the classification": Mistake(
        classification_loss,
        {"return F.cross_entropy(logits, labels)": "return F.cross_entropy(logits.softmax(1), labels)"},
        compared.test_fixmatch_trains_on_the_strong_view,
    ),
    "the strong view labels the weak one": of(
        FixMatch,
        "updates",
        {"(outputs.target_logits, weak,": "(weak, outputs.target_logits,"},
        compared.test_fixmatch_trains_on_the_strong_view,
    ),
    # MCD, MDD, SymNets
    "both classifiers begin alike": of(
        TwoClassifiers,
        "__init__",
        {
            "self.first, self.second = perceptron(sizes, batchnorm=True), perceptron(sizes, batchnorm=True)": (
                "self.first = self.second = perceptron(sizes, batchnorm=True)"
            )
        },
        compared.test_mcds_classifiers_differ_and_predict_together,
    ),
    "MCD's sum over classes": Mistake(
        losses.classifier_discrepancy, {".abs().mean()": ".abs().sum(1).mean()"}, compared.test_published_digits_of_mcd
    ),
    "MCD's distance of logits": Mistake(
        losses.classifier_discrepancy,
        {"F.softmax(logits_a, dim=1) - F.softmax(logits_b, dim=1)": "logits_a - logits_b"},
        classifiers.test_discrepancy_is_a_mean_over_classes_of_probabilities,
    ),
    "MDD without its reversal": of(
        MDD,
        "updates",
        {"-self.settings.reversal": "self.settings.reversal"},
        compared.test_mdd_reverses_what_reaches_the_encoder,
    ),
    "MDD's adversary moves the main classifier's target": Mistake(
        losses.margin_disparity,
        {"source_logits.argmax(1)": "source_adversarial.argmax(1)"},
        classifiers.test_margin_disparity_is_the_literal_formula,
    ),
    "SymNets' features move the classifiers": of(
        SymNets,
        "updates",
        {"features, frozen=True": "features"},
        compared.test_symnets_routes_each_loss_to_its_player,
    ),
    # DAN, JAN, RTN
    "a mean of kernels": Mistake(
        _gaussian_kernels,
        {"return total": "return total / 5"},
        discrepancy.test_kernels_are_summed_over_the_mean_of_different_pairs,
    ),
    "the bandwidth carries a gradient": Mistake(
        _gaussian_kernels,
        {"distances.detach()": "distances"},
        discrepancy.test_bandwidth_takes_no_gradient,
        ("full",),
    ),
    "JAN's predictions are constants": of(
        JAN,
        "updates",
        {"step.gather(logits).softmax(1)": "step.gather(logits).softmax(1).detach()"},
        compared.test_jan_moves_the_classifier_through_both_domains,
    ),
    "RTN's factors are centred": Mistake(
        losses.fused_mmd,
        {"features.double(), logits.double()": "features.double() - features.double().mean(0), logits.double()"},
        discrepancy.test_fused_factors_must_not_be_centred,
    ),
    "RTN's residual on the target": of(
        RTN,
        "updates",
        {
            "step.gather(outputs.target_logits)": (
                "step.gather(outputs.target_logits + self.residual(outputs.target_logits))"
            )
        },
        compared.test_rtn_moves_its_residual_by_the_source_and_predicts_without_it,
    ),
    # TPN, MCC, SDAT, ADDA
    "prototypes of one rank": of(
        TPN,
        "updates",
        {
            "step.gather(outputs.source_features), step.gather(outputs.target_features)": (
                "outputs.source_features, outputs.target_features"
            ),
            "step.gather(batch.source_labels)": "batch.source_labels",
        },
        compared.test_two_ranks_are_one,
        "tpn",
    ),
    "inner products for distances to prototypes": Mistake(
        _scores, {" - prototypes.square().sum(1)": ""}, prototypes.test_published_digits
    ),
    "MCC prefers uncertain rows": Mistake(
        losses.minimum_class_confusion,
        {"(-row_entropy(softened.detach()))": "(row_entropy(softened.detach()))"},
        predictions.test_published_digits,
    ),
    "MCC's weights carry a gradient": Mistake(
        losses.minimum_class_confusion, {"softened.detach()": "softened"}, predictions.test_published_digits
    ),
    "SDAT descends where it stands": of(
        SDAT,
        "_ahead",
        {"(self.trained, moved, (images,))": "(self.trained, parameters, (images,))"},
        compared.test_sdat_takes_its_gradients_higher_up,
    ),
    "ADDA's source encoder renews its statistics": of(
        FrozenCopy,
        "train",
        {"return self": "return super().train(mode)"},
        compared.test_adda_starts_from_the_source_and_leaves_it_alone,
    ),
    # TCA
    "a symmetric solver on a matrix that is not": Mistake(
        tca,
        {"eigh(scatter, penalty, subset": "eigh(np.linalg.solve(penalty, scatter), subset"},
        shallow.test_a_symmetric_solver_is_wrong,
        (0.1,),
    ),
}


def with_mistake(mistake: Mistake) -> Any:
    """The function as its source with the changes makes it."""
    function = inspect.unwrap(mistake.where)
    source = textwrap.dedent(inspect.getsource(function))
    for right, wrong in mistake.changes.items():
        assert source.count(right) == 1, (
            f"{function.__qualname__} has no longer what the mistake is planted in: {right}"
        )
        source = source.replace(right, wrong)
    # A function around it, whose variable __class__ is what super() without arguments asks for.
    around = f"def around(__class__):\n{textwrap.indent(source, '    ')}\n    return {function.__name__}\n"
    flags = __future__.annotations.compiler_flag
    namespace = dict(function.__globals__)
    exec(compile(around, "planted", "exec", flags=flags, dont_inherit=True), namespace)
    return namespace["around"](mistake.owner)


def plant(mistake: Mistake, patch: pytest.MonkeyPatch) -> None:
    """Put the mistake wherever the function is known."""
    wrong = with_mistake(mistake)
    if mistake.owner is not None:
        patch.setattr(mistake.owner, mistake.where.__name__, wrong)
        return
    for name, module in list(sys.modules.items()):
        if name.startswith(("gsda_fast", "test_losses", "test_shallow", "test_compared")):
            for known in [each for each, value in vars(module).items() if value is mistake.where]:
                patch.setattr(module, known, wrong)
    for term in [each for each, value in TERMS.items() if value is mistake.where]:
        patch.setitem(TERMS, term, wrong)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mistake = MISTAKES[name]
    plant(mistake, monkeypatch)
    fixtures = {"monkeypatch": monkeypatch} if "monkeypatch" in inspect.signature(mistake.seen_by).parameters else {}
    with pytest.raises(AssertionError) as raised:
        mistake.seen_by(*mistake.arguments, **fixtures)
    assert "has no longer" not in str(raised.value)
