"""AA-CLIP's prompts, maps, losses and scores by plain formulas; its stages train what they say, as by the reference."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import scipy.ndimage
import torch
import torch.nn.functional as F
from aa_clip_cases import adapted, inputs, small_clip, unit
from oracle import randn

from pyfused import models
from pyfused.bench.models.training import reference_operators

SIZE = (24, 24)


def levels(count: int = 2, batch: int = 3, patches: int = 16, width: int = 12) -> list[torch.Tensor]:
    """Unit patches on a grid of 4x4, float64, which want gradients."""
    drawn = (randn(batch, patches, width, dtype=torch.float64, seed=20 + level) for level in range(count))
    return [unit(level).requires_grad_() for level in drawn]


def text(*shape: int, width: int = 12) -> torch.Tensor:
    drawn = randn(*shape, width, 2, dtype=torch.float64, seed=9)
    return (drawn / drawn.norm(dim=-2, keepdim=True)).requires_grad_()


def masks(batch: int = 3) -> torch.Tensor:
    made = torch.zeros(batch, *SIZE, dtype=torch.bool)
    for number in range(1, batch):
        made[number, 3 * number : 12, 5:15] = True
    return made


def plain_logits(patches: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    scores = 100 * torch.einsum("bnw,bws->bsn", patches, given.expand(len(patches), -1, -1))
    return F.interpolate(scores.reshape(len(patches), 2, 4, 4), SIZE, mode="bilinear", align_corners=True)


def plain_segmentation(maps: list[torch.Tensor], given: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64)
    m = wanted.double()
    for patches in maps:
        p = plain_logits(patches, given).softmax(1)
        true = p[:, 1] * m + p[:, 0] * (1 - m)
        total = total - ((1 - true) ** 2 * true.log()).mean()
        for share, mask in ((p[:, 0], 1 - m), (p[:, 1], m)):
            for one, other in zip(share, mask, strict=True):
                total = total + (1 - (2 * (one * other).sum() + 1) / (one.sum() + other.sum() + 1)) / len(m)
    return total


def same_with_gradients(actual: torch.Tensor, expected: torch.Tensor, by: list[torch.Tensor]) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    found, wanted = (torch.autograd.grad(value, by, retain_graph=True) for value in (actual, expected))
    for one, other in zip(found, wanted, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


class TestPrompts:
    def test_three_normal_and_five_abnormal_states_in_two_templates(self):
        normal, abnormal = models.anomaly_prompts("metal nut")
        assert (len(normal), len(abnormal)) == (6, 10)
        assert len({*normal, *abnormal}) == 16
        assert all("metal nut" in prompt and "{" not in prompt for prompt in normal + abnormal)
        assert normal[:2] == ["metal nut.", "a photo of metal nut."]
        assert abnormal[0] == "a damaged metal nut."

    def test_own_words(self):
        normal, abnormal = models.anomaly_prompts("leaf", ["green {}"], ["brown {}", "dry {}"], ["{}!"])
        assert (normal, abnormal) == (["green leaf!"], ["brown leaf!", "dry leaf!"])

    @pytest.mark.parametrize(
        ("settings", "error", "message"),
        [
            ({"name": 3}, TypeError, "name must be a str, got int"),
            ({"name": " "}, ValueError, "name must say what the class is, got ' '"),
            ({"normal": "a {}"}, TypeError, "normal must be a sequence of str, got 'a {}'"),
            ({"abnormal": ["broken"]}, ValueError, r"abnormal must be strings with one \{\} each, .* got \['broken'\]"),
            ({"templates": []}, ValueError, r"templates must be .* at least one, got \[\]"),
        ],
    )
    def test_refusals(self, settings, error, message):
        with pytest.raises(error, match=f"anomaly_prompts: {message}"):
            models.anomaly_prompts(**{"name": "leaf"} | settings)


class TestMaps:
    @pytest.mark.parametrize("shape", [(), (3,)])
    def test_logits(self, shape):
        (patches,), given = levels(1), text(*shape)
        actual = models.anomaly_logits(patches, given, SIZE)
        assert actual.shape == (3, 2, *SIZE)
        # The corners are patches, not between them.
        torch.testing.assert_close(actual[:, :, 0, 0], 100 * (patches[:, :1] @ given)[:, 0])
        weights = randn(3, 2, *SIZE, dtype=torch.float64)
        same_with_gradients((actual * weights).sum(), (plain_logits(patches, given) * weights).sum(), [patches, given])

    def test_logits_of_images_that_are_not_square(self):
        patches = unit(randn(1, 6, 12, dtype=torch.float64))
        wide = models.anomaly_logits(patches, text(), (20, 30))
        torch.testing.assert_close(wide[0, :, -1, 0], 100 * (patches[0, 3] @ text()))
        high = models.anomaly_logits(patches, text(), (30, 20))
        torch.testing.assert_close(high[0, :, -1, 0], 100 * (patches[0, 4] @ text()))

    @pytest.mark.parametrize(("kernel", "sigma"), [(7, 1.0), (5, 1.5), (1, 1.0)])
    def test_map(self, kernel, sigma):
        """Of each level (1 + abnormal - normal) / 2, blurred on the patches, brought to the image, summed."""
        maps, given = levels(), text(3)
        actual = models.anomaly_map(maps, given, SIZE, kernel, sigma)
        steps = np.arange(kernel) - kernel // 2
        weights = np.exp(-(steps**2) / (2 * sigma**2))
        expected = 0
        for patches in maps:
            scores = 100 * torch.einsum("bnw,bws->bsn", patches, given).detach()
            scores = ((1 + scores[:, 1] - scores[:, 0]) / 2).reshape(3, 4, 4).numpy()
            for axis in (1, 2):
                scores = scipy.ndimage.correlate1d(scores, weights / weights.sum(), axis, mode="mirror")
            expected = (
                expected + F.interpolate(torch.tensor(scores)[:, None], SIZE, mode="bilinear", align_corners=True)[:, 0]
            )
        torch.testing.assert_close(actual.detach(), expected, rtol=1e-10, atol=1e-10)

    def test_scores(self):
        detection, given = randn(3, 12, dtype=torch.float64), text(3)
        scores = models.detection_score(detection, given)
        torch.testing.assert_close(scores, (1 + (detection * given[:, :, 1]).sum(1)) / 2)
        maps = randn(3, *SIZE, dtype=torch.float64)
        actual = models.image_score(maps, scores)
        highest = (maps.amax((1, 2)) - maps.min()) / (maps.max() - maps.min())
        torch.testing.assert_close(actual, (highest + (scores - scores.min()) / (scores.max() - scores.min())) / 2)
        assert (models.image_score(torch.zeros(2, 3, 3), torch.ones(2)) == 0).all()

    def test_16_bits_are_compared_in_float32(self):
        (patches,), given = levels(1), text()
        exact = plain_logits(patches.bfloat16().double(), given.bfloat16().double())
        for actual in (
            models.anomaly_logits(patches.bfloat16(), given.bfloat16(), SIZE),
            *(models.detection_score(patches.bfloat16()[:, 0], given.bfloat16())[None],),
        ):
            assert actual.dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            under = models.anomaly_logits(patches.bfloat16(), given.bfloat16(), SIZE)
        assert (under - exact).abs().max() < 1e-4


class TestLosses:
    def test_segmentation(self):
        maps, given, wanted = levels(), text(3), masks()
        same_with_gradients(
            models.segmentation_loss(maps, given, wanted), plain_segmentation(maps, given, wanted), [*maps, given]
        )
        assert torch.equal(
            models.segmentation_loss(maps, given, wanted.double()), models.segmentation_loss(maps, given, wanted)
        )

    def test_focal(self):
        logits = (5 * randn(3, 2, *SIZE, dtype=torch.float64)).requires_grad_()
        wanted = masks()
        cross_entropy = F.cross_entropy(logits, wanted.long())
        same_with_gradients(models.focal_loss(logits, wanted, gamma=0), cross_entropy, [logits])
        p = logits.softmax(1).gather(1, wanted.long()[:, None])[:, 0]
        for gamma in (1.0, 2.0, 3.5):
            expected = -((1 - p) ** gamma * p.log()).mean()
            same_with_gradients(models.focal_loss(logits, wanted, gamma), expected, [logits])

    def test_focal_of_a_certain_mistake_is_finite(self):
        logits = torch.tensor([[200.0], [-200.0]]).reshape(1, 2, 1, 1).requires_grad_()
        for mask, loss in ((1, 400.0), (0, 0.0)):
            found = models.focal_loss(logits, torch.full((1, 1, 1), mask))
            assert found.item() == loss
            (gradient,) = torch.autograd.grad(found, logits)
            assert gradient.flatten().tolist() == ([1.0, -1.0] if mask else [0.0, 0.0])

    def test_dice(self):
        shares, wanted = torch.rand(2, 4, 4, dtype=torch.float64), torch.zeros(2, 4, 4)
        wanted[1, :2] = 1
        first = 1 - 1 / (shares[0].sum() + 1)
        second = 1 - (2 * shares[1, :2].sum() + 1) / (shares[1].sum() + 8 + 1)
        torch.testing.assert_close(models.dice_loss(shares, wanted), (first + second) / 2)
        assert models.dice_loss(wanted, wanted) == 0

    def test_stage_1(self):
        """... adds 0.1 * (mean over classes of normal . abnormal)^2, each class counted once."""
        maps, given, wanted = levels(), text(2), masks()
        classes = torch.tensor([1, 0, 1])
        together = sum((given[n, :, 0] * given[n, :, 1]).sum() for n in range(2)) / 2
        for settings, weight in (({}, 0.1), ({"weight": 2.0}, 2.0)):
            actual = models.text_stage_loss(maps, given, wanted, classes, **settings)
            expected = plain_segmentation(maps, given[classes], wanted) + weight * together**2
            same_with_gradients(actual, expected, [*maps, given])

    def test_stage_2(self):
        """... adds the cross-entropy of detection . text against the labels."""
        maps, given, wanted = levels(), text(3), masks()
        detection, labels = randn(3, 12, dtype=torch.float64).requires_grad_(), torch.tensor([0, 1, 1])
        logits = torch.stack([detection[n] @ given[n] for n in range(3)])
        picked = logits.log_softmax(1)[torch.arange(3), labels]
        same_with_gradients(
            models.image_stage_loss(maps, detection, given, wanted, labels),
            plain_segmentation(maps, given, wanted) - picked.mean(),
            [*maps, detection, given],
        )

    @pytest.mark.parametrize(
        ("call", "error", "message"),
        [
            (
                lambda m: m.anomaly_logits(levels(1)[0][0], text(), SIZE), ValueError,
                r"patches must have shape \(B, patches, width\), got \(16, 12\)",
            ),
            (
                lambda m: m.anomaly_logits(levels(1, patches=15)[0], text(), SIZE), ValueError,
                r"patches must form a grid with the proportions of size \(24, 24\), got 15",
            ),
            (
                lambda m: m.anomaly_logits(levels(1)[0], text(2), SIZE), ValueError,
                r"text must have shape \(width, 2\) = \(12, 2\) or \(B, width, 2\) = \(3, 12, 2\), got \(2, 12, 2\)",
            ),
            (lambda m: m.anomaly_logits(levels(1)[0], [], SIZE), TypeError, r"text must be a torch\.Tensor, got list"),
            (lambda m: m.anomaly_map([], text(), SIZE), ValueError, "levels must have at least one level, got none"),
            (lambda m: m.anomaly_map(levels(), text(), SIZE, 4), ValueError, "kernel must be odd and .*, got 4 and 1"),
            (lambda m: m.anomaly_map(levels(), text(), SIZE, 7, 0), ValueError, "sigma above 0, got 7 and 0"),
            (
                lambda m: m.anomaly_map(levels(), text(), SIZE, 9), ValueError,
                r"kernel must reach less far than the grid of patches \(4, 4\), got 9",
            ),
            (lambda m: m.segmentation_loss([], text(), masks()), ValueError, "levels must have at least one level"),
            (
                lambda m: m.segmentation_loss(levels(), text(), masks()[:, None]), ValueError,
                r"masks must have shape \(B, H, W\), got \(3, 1, 24, 24\)",
            ),
            (
                lambda m: m.segmentation_loss(levels(), text(), masks(2)), ValueError,
                r"focal_loss: masks must have shape \(B, H, W\) = \(3, 24, 24\), got \(2, 24, 24\)",
            ),
            (
                lambda m: m.focal_loss(torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2), 0.5), ValueError,
                "gamma must be 0 or at least 1, got 0.5",
            ),
            (
                lambda m: m.focal_loss(torch.zeros(1, 3, 2, 2), torch.zeros(1, 2, 2)), ValueError,
                r"logits must have shape \(B, 2, H, W\), got \(1, 3, 2, 2\)",
            ),
            (
                lambda m: m.text_stage_loss(levels(), text(), masks(), torch.zeros(3).long()), ValueError,
                r"text must have shape \(classes, width, 2\), got \(12, 2\)",
            ),
        ],
    )  # fmt: skip
    def test_refusals(self, call, error, message):
        with pytest.raises(error, match=message):
            call(models)


SIDES = {1: "text_", 2: ("image_", "projections.", "detection_projection.")}


class Stage:
    """Steps of a stage of one small model with Adam, as in the recipe."""

    def __init__(self, model: models.AdaptedCLIP, stage: int, crossed: bool = True, adapted: bool = False) -> None:
        self.model, self.stage, self.crossed, self.adapted = model.eval(), stage, crossed, adapted
        self.images, tokens = inputs(images=4, prompts=6)
        self.normal, self.abnormal = tokens[:2], tokens[2:]
        self.masks = torch.zeros(4, 48, 48, dtype=torch.bool)
        self.masks[2:, 10:30, 5:25] = True
        self.labels = torch.tensor([0, 0, 1, 1])
        trained = model.set_stage(stage, crossed)
        self.optimizer = torch.optim.Adam(trained, lr=1e-3, betas=(0.5, 0.999))

    def loss(self) -> torch.Tensor:
        if self.stage == 1:
            maps = self.model.image_context(self.images, self.adapted)
            given = self.model.encode_class(self.normal, self.abnormal, maps[0] if self.crossed else None)
            return models.text_stage_loss(maps, given[None], self.masks, torch.zeros(4).long())
        with torch.no_grad():
            given = self.model.encode_class(self.normal, self.abnormal)
            context = self.model.text_context(torch.cat([self.normal, self.abnormal])) if self.crossed else None
        maps, detection, _ = self.model.encode_image(self.images, context)
        return models.image_stage_loss(maps, detection, given, self.masks, self.labels)

    def step(self) -> float:
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


def fresh() -> models.AdaptedCLIP:
    return adapted(small_clip(embed_dim=48))


class TestTraining:
    @pytest.mark.parametrize("crossed", [True, False])
    @pytest.mark.parametrize(("stage", "behind"), [(1, False), (1, True), (2, False)])
    def test_a_stage_trains_its_side_and_nothing_else(self, stage, behind, crossed):
        model = fresh()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        run = Stage(model, stage, crossed, behind)
        losses = [run.step() for _ in range(3)]
        assert losses[-1] < losses[0]
        moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        expected = {
            name
            for name in before
            if name.startswith(SIDES[stage])
            and (crossed or "cross_attention" not in name)
            # Softmax is blind to a shift of all logits.
            and not name.endswith("k_bias")
        }
        assert moved - {name for name in moved if name.endswith("k_bias")} == expected
        assert not any(name.startswith("clip.") for name in moved)
        assert all(p.grad is None for p in model.clip.parameters())

    @pytest.mark.parametrize("stage", [1, 2])
    def test_a_learnable_weight_moves_with_its_stage(self, stage):
        model = adapted(small_clip(embed_dim=48), learnable_weight=True)
        gates = {1: model.text_cross_attention.gate, 2: model.image_cross_attention.gate}
        run = Stage(model, stage)
        run.step()
        assert gates.pop(stage).item() != pytest.approx(0.1, abs=1e-6)
        assert [gate.item() for gate in gates.values()] == pytest.approx([0.1])

    @pytest.mark.parametrize("settings", [{}, {"learnable_weight": True}, {"zero_init": True, "norm_match": False}])
    @pytest.mark.parametrize(("stage", "behind"), [(1, False), (1, True), (2, False)])
    def test_it_is_the_training_on_the_reference_step_by_step(self, stage, behind, settings):
        """float32, 20 steps of one seed: losses to 1e-4."""
        ours = adapted(small_clip(embed_dim=48), **settings)
        theirs = copy.deepcopy(ours)
        run, reference = Stage(ours, stage, adapted=behind), Stage(theirs, stage, adapted=behind)
        found = [run.step() for _ in range(20)]
        with reference_operators():
            expected = [reference.step() for _ in range(20)]
        assert found[-1] < 0.97 * found[0]
        assert found == pytest.approx(expected, rel=1e-4)

    def test_the_two_arms_differ_by_cross_attention_alone(self):
        crossed, plain = (Stage(model, 2, flag) for model in [fresh()] for flag in (True, False))
        with_it = crossed.loss()
        crossed.model.image_cross_attention.weight = 0.0
        assert not math.isclose(with_it.item(), crossed.loss().item(), rel_tol=1e-6)
        torch.testing.assert_close(crossed.loss(), plain.loss())
