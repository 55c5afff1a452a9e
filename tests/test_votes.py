"""The loop: images share batches, blocks are drawn at once, memory stays small; the votes are those of each alone."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from certify import Gaussian, SmoothedClassifier
from certify.engine.monte_carlo import Job, count_votes
from certify.errors import RunFault
from certify.models.pipeline import Pipeline
from certify.smoothing.rng import block_generator, block_size, stream_key

STAGES = {"selection": 10, "estimation": 1500}


class TestLoop:
    @pytest.mark.parametrize("batch_size", [1, 64, 1000])
    def test_images_that_share_batches_get_the_votes_they_get_alone(
        self, batch_size: int, linear_classifier: Any
    ) -> None:
        f = Pipeline(linear_classifier(torch.ones(12), 6.0))
        images = [torch.full((3, 2, 2), v) for v in (0.45, 0.5, 0.55)]
        jobs = [Job(x, stream_key(0, str(i), s), n, keep=3) for i, x in enumerate(images) for s, n in STAGES.items()]
        alone = [next(count_votes(f, Gaussian(0.25), [job], batch_size=1000)) for job in jobs]
        together = list(count_votes(f, Gaussian(0.25), jobs, batch_size=batch_size))
        assert [t.votes for t in together] == [t.votes for t in alone]
        assert [t.labels.tolist() for t in together] == [t.labels.tolist() for t in alone]

    def test_full_batches(self, linear_classifier: Any) -> None:
        """Twenty images of 10 + 20 samples: batches of 64 to the last but one, not sixty small ones."""
        sizes: list[int] = []

        class Spy(linear_classifier):  # type: ignore[misc]
            def __call__(self, images: Tensor) -> Tensor:
                sizes.append(len(images))
                return super().__call__(images)

        f = Pipeline(Spy(torch.ones(12), 6.0))
        image = torch.full((3, 2, 2), 0.5)
        jobs = [Job(image, stream_key(0, str(i), s), n) for i in range(20) for s, n in (("a", 10), ("b", 20))]
        tallies = list(count_votes(f, Gaussian(0.25), jobs, batch_size=64))
        assert sizes == [64] * 9 + [24]
        assert [t.votes.trials for t in tallies] == [10, 20] * 20

    def test_a_key_that_is_used_once_draws_no_more_than_it_needs(self, linear_classifier: Any) -> None:
        """Three samples instead of a block of 1,000, from the same generator each time."""
        drawn: list[int] = []

        class Spy(Gaussian):
            def sample(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
                drawn.append(shape[0])
                return super().sample(shape, generator)

        f, image = Pipeline(linear_classifier(torch.ones(12), 6.0)), torch.full((3, 2, 2), 0.5)
        jobs = [Job(image, stream_key(0, "x", "a"), 3, keep=3, once=once) for once in (False, True, True)]
        tallies = list(count_votes(f, Spy(0.25), jobs, batch_size=64))
        assert drawn == [block_size(12), 3, 3]
        assert [t.votes.trials for t in tallies] == [3, 3, 3]
        assert tallies[1].labels.tolist() == tallies[2].labels.tolist()

    def test_without_noise_the_image_itself(self, linear_classifier: Any) -> None:
        f = Pipeline(linear_classifier(torch.ones(12), 6.0))
        jobs = [Job(torch.full((3, 2, 2), v), None, 1, keep=1) for v in (0.4, 0.6, 0.4)]
        assert [int(t.labels) for t in count_votes(f, Gaussian(0.25), jobs, batch_size=2)] == [0, 1, 0]

    def test_images_of_several_sizes(self) -> None:
        class Mean:
            num_classes = 2

            def __call__(self, images: Tensor) -> Tensor:
                return (images.mean((1, 2, 3)) > 0.5).long()

            def describe(self) -> dict[str, Any]:
                return {}

        shapes = [(1, 4, 4), (1, 8, 8), (3, 4, 4)]
        jobs = [Job(torch.full(s, 0.6), stream_key(0, str(s), "a"), 150) for s in shapes]
        assert [t.votes.trials for t in count_votes(Mean(), Gaussian(0.1), jobs, batch_size=64)] == [150] * 3

    @pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 8")])
    def test_memory_that_is_too_small_is_learnt_once(self, error: Exception, linear_classifier: Any) -> None:
        """After one batch that did not fit, all later ones are smaller: no failure a batch, and the same votes."""
        failures: list[int] = []

        class Small(linear_classifier):  # type: ignore[misc]
            def __call__(self, images: Tensor) -> Tensor:
                if len(images) > 50:
                    failures.append(len(images))
                    raise error
                return super().__call__(images)

        job = Job(torch.full((3, 4, 4), 0.5), stream_key(0, "x", "a"), 5000)
        arguments = (torch.ones(48), 24.0)
        (tally,) = count_votes(Pipeline(Small(*arguments)), Gaussian(0.25), [job], batch_size=400)
        (plain,) = count_votes(Pipeline(linear_classifier(*arguments)), Gaussian(0.25), [job], batch_size=400)
        assert tally.votes == plain.votes
        assert failures == [400, 200, 100, 100, 200, 100, 100]

    def test_a_classifier_that_uses_its_output_again(self, linear_classifier: Any) -> None:
        """Labels in memory that the next call overwrites, as recorded graphs give them, and batches that are halved."""
        buffer = torch.zeros(400, dtype=torch.int64)

        class Reusing(linear_classifier):  # type: ignore[misc]
            def __call__(self, images: Tensor) -> Tensor:
                if len(images) > 100:
                    raise MemoryError
                return buffer[: len(images)].copy_(super().__call__(images))

        job = Job(torch.full((3, 4, 4), 0.5), stream_key(0, "x", "a"), 1000, keep=500)
        arguments = (torch.ones(48), 24.0)
        (found,) = count_votes(Pipeline(Reusing(*arguments)), Gaussian(0.25), [job], batch_size=400)
        (plain,) = count_votes(Pipeline(linear_classifier(*arguments)), Gaussian(0.25), [job], batch_size=400)
        assert found.votes == plain.votes
        assert torch.equal(found.labels, plain.labels)

    @pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
    def test_labels_of_any_integer_type(self, dtype: torch.dtype, linear_classifier: Any) -> None:
        class Typed(linear_classifier):  # type: ignore[misc]
            def __call__(self, images: Tensor) -> Tensor:
                return super().__call__(images).to(dtype)

        job = Job(torch.full((3, 4, 4), 0.5), stream_key(0, "x", "a"), 1000)
        (found,) = count_votes(Pipeline(Typed(torch.ones(48), 24.0)), Gaussian(0.25), [job], batch_size=400)
        (plain,) = count_votes(Pipeline(linear_classifier(torch.ones(48), 24.0)), Gaussian(0.25), [job], batch_size=400)
        assert found.votes == plain.votes

    def test_blocks_drawn_at_once_are_the_blocks_drawn_one_by_one(self, linear_classifier: Any) -> None:
        """Blocks of 307,200 values are drawn on several threads; the samples are those of the stream, in order."""
        seen: list[Tensor] = []

        class Spy(linear_classifier):  # type: ignore[misc]
            def __call__(self, images: Tensor) -> Tensor:
                seen.append(images.clone())
                return super().__call__(images)

        key, image = stream_key(0, "x", "a"), torch.zeros(3, 32, 32)
        list(count_votes(Pipeline(Spy(torch.ones(3072), 0.0)), Gaussian(0.25), [Job(image, key, 450)], batch_size=64))
        step = block_size(3072)
        drawn = [0.25 * torch.randn((step, 3, 32, 32), generator=block_generator(key, b)) for b in range(5)]
        assert torch.equal(torch.cat(seen), torch.cat(drawn)[:450])


@pytest.mark.slow
def test_memory_does_not_grow_with_n() -> None:
    """Peak memory of 400,000 samples is that of 20,000, in processes of their own."""
    code = """
import resource, sys, torch
from certify import SmoothedClassifier, load_classifier
g = SmoothedClassifier(load_classifier("digits"), 0.25)
g.votes(torch.rand(1, 8, 8), int(sys.argv[1]), stage="a")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    peaks = [
        int(subprocess.run([sys.executable, "-c", code, n], capture_output=True, check=True).stdout)
        for n in ("20000", "400000")
    ]
    assert peaks[1] < 1.1 * peaks[0]


ANSWERS: dict[str, Callable[[SmoothedClassifier, Tensor], Any]] = {
    "certify": lambda g, x: g.certify(x, n0=50, n=500),
    "certify to a tolerance": lambda g, x: g.certify(x, n0=1, n=500, tolerance=0.1),
    "decide": lambda g, x: g.decide(x, radius=0.001, n=500),
    "predict": lambda g, x: g.predict(x, n=500),
}


class Memory:
    """A half-space whose memory holds so many images at once, at each call anew; it notes the batches that fitted."""

    num_classes = 2

    def __init__(self, room: Callable[[int], int]) -> None:
        self.room, self.calls, self.sizes = room, 0, list[int]()

    def __call__(self, images: Tensor) -> Tensor:
        self.calls += 1
        if len(images) > self.room(self.calls):
            raise MemoryError
        self.sizes.append(len(images))
        return (images.mean((1, 2, 3)) > 0.5).long()

    def describe(self) -> dict[str, Any]:
        return {}


GREY = torch.full((3, 2, 2), 130, dtype=torch.uint8)


def checked(f: Memory, batch_size: int) -> SmoothedClassifier:
    """A smoothed classifier with exact noise, its contract checked: the calls from here on are for votes."""
    g = SmoothedClassifier(f, 0.25, noise="exact", batch_size=batch_size)
    g.check_contract(g.check(GREY))
    f.calls = 0
    f.sizes.clear()
    return g


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
def test_exact_noise_keeps_one_batch_shape_where_memory_is_small(
    answer: Callable[[SmoothedClassifier, Tensor], Any],
) -> None:
    """Batches of 101 do not fit, nor do halves of 51: every label that counts comes from a batch of 26."""
    small, large = Memory(lambda call: 30), Memory(lambda call: 1000)
    found, expected = (answer(checked(f, 101), GREY) for f in (small, large))
    assert found == expected
    assert (set(small.sizes), set(large.sizes)) == ({26}, {101})


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
def test_exact_noise_keeps_its_batch_shape_when_memory_runs_out_later(
    answer: Callable[[SmoothedClassifier, Tensor], Any],
) -> None:
    """Once is waited for; twice is a fault that says what to do, never a label from a batch of another shape."""
    once = Memory(lambda call: 100)
    g = checked(once, 16)
    once.room = lambda call: 5 if call == 3 else 100
    answer(g, GREY)
    answer(g, GREY)
    assert set(once.sizes) == {16}
    twice = Memory(lambda call: 100)
    g = checked(twice, 16)
    twice.room = lambda call: 5 if call >= 3 else 100
    with pytest.raises(RunFault) as error:
        answer(g, GREY)
    assert str(error.value) == (
        "out of memory in a batch of 16 images, which fitted before; this noise needs one batch shape for all samples "
        "of an image: free memory, or pass batch_size=8"
    )
    assert set(twice.sizes) == {16}


def test_exact_noise_settles_a_batch_shape_for_each_image_shape() -> None:
    """Larger images fit in smaller batches; a size that was settled for small ones does not bind them."""

    class Pixels(Memory):
        def __call__(self, images: Tensor) -> Tensor:
            self.room = lambda call: 960 // images[0].numel()
            return super().__call__(images)

    f = Pixels(lambda call: 0)
    g = checked(f, 64)
    for side, size in ((2, 64), (8, 4), (2, 64), (4, 16)):
        f.sizes.clear()
        g.votes(torch.full((3, side, side), 130, dtype=torch.uint8), 150, stage="a")
        assert set(f.sizes) == {size}


def test_exact_noise_keeps_one_batch_shape(linear_classifier: Any) -> None:
    """Rounding may depend on a batch's shape: with exact noise every forward pass has the same one."""
    sizes: set[int] = set()

    class Spy(linear_classifier):  # type: ignore[misc]
        def __call__(self, images: Tensor) -> Tensor:
            sizes.add(len(images))
            return super().__call__(images)

    g = SmoothedClassifier(Spy(torch.ones(12), 6.0), 0.25, noise="exact", batch_size=64)
    image = torch.full((3, 2, 2), 128, dtype=torch.uint8)
    g.check_contract(g.check(image))
    sizes.clear()
    assert g.votes(image, 150, stage="estimation").trials == 150
    assert g.decide(image, radius=0.1).drawn > 0
    assert sizes == {64}
