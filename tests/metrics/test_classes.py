import copy
import pickle

import pytest
import torch
from torchmetrics import MetricCollection

from captum_robust.metrics import (
    ROAD,
    AttributionStability,
    CertifiedLocalizationError,
    CertifiedPointing,
    CertifiedShare,
    Deletion,
    Infidelity,
    Insertion,
    LocalizationError,
    MaxBoxAcc,
    MaxBoxAccV2,
    ModelRandomization,
    PointingGame,
    PxAP,
    Sensitivity,
)
from captum_robust.metrics import functional as F

N = 14
IDS = [f"{i}.jpg" for i in range(N)]


def some_batch():
    """Objects, and maps that are high on them here and there, so that no value is 0 or 1."""
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(N, 1, 2, generator=generator) * torch.tensor([20.0, 15.0])
    boxes = list(torch.cat([corner, corner + torch.tensor([20.0, 15.0])], dim=2).round())
    masks = torch.stack([F.boxes_to_mask(box, (30, 40)) for box in boxes])
    noise = torch.rand(N, 1, 5, 5, generator=generator)
    noise = torch.nn.functional.interpolate(noise, size=(30, 40), mode="bilinear")[:, 0]
    maps = noise + masks * torch.linspace(0, 0.6, N)[:, None, None]
    boxes[3], masks[3] = torch.zeros(0, 4), False
    return maps, boxes, masks, torch.arange(N) % 3


MAPS, BOXES, MASKS, CLASSES = some_batch()


def localization(**options):
    swept = F.sweep_boxes(MAPS)
    inclusive = F.PROTOCOLS[options.get("protocol", "whi2020")].inclusive
    ious = {s: F.best_iou(boxes, BOXES, inclusive) for s, boxes in swept.items()}
    return F.localization_error(ious, ids=IDS, **options).error


class Brightness:
    """A classifier of two classes, any part of which is itself."""

    def __call__(self, x):
        p = x.mean(dim=(1, 2, 3))
        return torch.stack([p, 1 - p], dim=1).log()

    def __getitem__(self, _):
        return self


IMAGES = torch.rand(N, 3, 30, 40, generator=torch.Generator().manual_seed(1)).pow(3)
SHOWN = (Brightness(), IMAGES, MAPS, CLASSES % 2)


class Filter(torch.nn.Conv2d):
    """A model that is its own explanation, any part of which is itself."""

    def forward(self, images, _=None):
        return super().forward(images)[:, 0]

    def __getitem__(self, _):
        return self


torch.manual_seed(0)
CONV = Filter(3, 1, 3, padding=1)


class Brightest(Brightness):
    """An explanation."""

    def __call__(self, images, _):
        return images.amax(dim=1)


INSIDE, OUTSIDE = MAPS > 0.9, MAPS < 0.3
INSIDE[5] = False  # nothing that could point
INNER = torch.stack([F.mask_to_box(F.largest_component(m[None] > 0.8))[0] for m in MAPS])
OUTER = INNER + torch.tensor([-2.0, -2.0, 2.0, 2.0])
INNER[7] = torch.nan

# Metric, its update arguments by sample, and the value of the pure functions on all at once.
CASES = {
    "error": (LocalizationError(), (MAPS, BOXES, IDS), localization()),
    "error, oracle": (
        LocalizationError(oracle=True),
        (MAPS, BOXES, IDS),
        localization(oracle=True),
    ),
    "error, seed and blacklist": (
        LocalizationError(seed=2, blacklist=IDS[4:6]),
        (MAPS, BOXES, IDS),
        localization(seed=2, blacklist=IDS[4:6]),
    ),
    "error, three overlaps": (
        LocalizationError(protocol="maxboxacc_v2"),
        (MAPS, BOXES, IDS),
        localization(protocol="maxboxacc_v2"),
    ),
    "MaxBoxAcc": (MaxBoxAcc(), (MAPS, BOXES), F.maxboxacc(MAPS, BOXES)),
    "MaxBoxAcc, polygon": (
        MaxBoxAcc("polygon"),
        (MAPS, BOXES),
        F.maxboxacc(MAPS, BOXES, contours="polygon"),
    ),
    "MaxBoxAccV2": (MaxBoxAccV2(), (MAPS, BOXES), F.maxboxacc_v2(MAPS, BOXES)),
    "PxAP": (PxAP(), (MAPS, MASKS), F.pxap(MAPS, MASKS)),
    "PxAP, ignore": (PxAP(), (MAPS, MASKS, MAPS > 0.7), F.pxap(MAPS, MASKS, MAPS > 0.7)),
    "pointing game": (
        PointingGame(tolerance=2),
        (MAPS, BOXES),
        F.pointing_game_accuracy(F.pointing_game_hits(MAPS, BOXES, 2)),
    ),
    "pointing game by class": (
        PointingGame(5, tolerance=2),
        (MAPS, MASKS, CLASSES),
        F.pointing_game_accuracy(F.pointing_game_hits(MAPS, MASKS, 2), CLASSES),
    ),
    "deletion": (Deletion(5), SHOWN, F.deletion_curve(*SHOWN, steps=5).area.mean()),
    "insertion": (
        Insertion(4, "mean", batch_size=3),
        SHOWN,
        F.insertion_curve(*SHOWN, steps=4, fill="mean").area.mean(),
    ),
    "infidelity": (
        Infidelity(5, "blur", seed=1),
        SHOWN,
        F.infidelity(*SHOWN, squares=5, fill="blur", seed=1).mean(),
    ),
    "sensitivity": (
        Sensitivity(0.1, 3, seed=1),
        (Brightest(), IMAGES, CLASSES),
        F.sensitivity(Brightest(), IMAGES, CLASSES, radius=0.1, samples=3, seed=1).mean(),
    ),
    "randomization": (
        ModelRandomization("ssim", stages=1, seed=1),
        (CONV, CONV, IMAGES, CLASSES),
        F.model_randomization(CONV, CONV, IMAGES, CLASSES, seed=1).ssim.mean(),
    ),
    "certified share": (
        CertifiedShare(),
        (INSIDE, OUTSIDE),
        (INSIDE | OUTSIDE).double().mean(),
    ),
    "certified pointing": (
        CertifiedPointing(),
        (INSIDE, MASKS),
        F.certified_pointing(INSIDE, MASKS).nanmean(),
    ),
    "certified error": (
        CertifiedLocalizationError(0.2),
        (INNER, OUTER, BOXES),
        F.certified_localization_error(INNER, OUTER, BOXES, 0.2),
    ),
    "ROAD": (
        ROAD((0.2, 0.5), seed=1),
        SHOWN,
        F.road(*SHOWN, shares=(0.2, 0.5), seed=1).combined.mean(),
    ),
}


@pytest.fixture(params=CASES)
def case(request):
    metric, arguments, expected = CASES[request.param]
    return copy.deepcopy(metric), arguments, float(expected)


def part(arguments, start, stop, step=1):
    return [argument[start:stop:step] for argument in arguments]


def test_class_gives_the_value_of_the_functions(case):
    metric, arguments, expected = case
    metric.update(*arguments)
    assert metric.compute().item() == pytest.approx(expected, abs=2e-6)


def test_batches_give_the_value_of_one_pass(case):
    metric, arguments, expected = case
    for start in range(0, N, 4):
        metric.update(*part(arguments, start, start + 4))
    assert metric.compute().item() == pytest.approx(expected, abs=2e-6)


def test_merging_the_states_of_two_shards_gives_the_value_of_one_pass(case):
    metric, arguments, expected = case
    other = copy.deepcopy(metric)
    metric.update(*part(arguments, 0, N, 2))
    other.update(*part(arguments, 1, N, 2))
    metric.merge_state(other)
    assert metric.compute().item() == pytest.approx(expected, abs=2e-6)


def test_reset_forgets_and_pickle_remembers(case):
    metric, arguments, expected = case
    metric.update(*part(arguments, 0, 5))
    metric.reset()
    metric.update(*arguments)
    assert pickle.loads(pickle.dumps(metric)).compute().item() == pytest.approx(expected, abs=2e-6)


def test_plot_draws_the_value_now_and_a_list_of_values(case):
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("Agg")
    metric, arguments, expected = case
    metric.update(*arguments)
    _, axes = metric.plot()
    assert axes.lines[0].get_ydata() == pytest.approx([expected], abs=2e-6)
    _, axes = metric.plot([torch.tensor(0.25), metric.compute()])
    assert axes.lines[0].get_ydata() == pytest.approx([0.25, expected], abs=2e-6)
    plt.close("all")


def test_plot_draws_each_measure_of_stability():
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("Agg")
    metric = AttributionStability(measures=["spearman", "top_k"])
    metric.update(MAPS, 2 * MAPS)
    _, axes = metric.plot()
    drawn = {line.get_label(): float(line.get_ydata()[0]) for line in axes.lines}
    assert drawn == pytest.approx({"spearman": 1.0, "top_k": 1.0})
    plt.close("all")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_counts_and_settings_stay_whole_numbers_under_set_dtype(dtype):
    # float16 counts to 2048, and its largest number is less than most numbers of settings
    both = MetricCollection({"near": PointingGame(tolerance=1), "far": PointingGame(tolerance=40)})
    both.set_dtype(dtype)
    mask = torch.zeros(3000, 4, 60, dtype=torch.bool)
    mask[:, :, 0] = True
    both.update(mask.flip(2).float(), mask)
    both.update(mask.flip(2).float(), mask)
    assert both["near"].totals.item() == both["far"].totals.item() == 6000
    assert both["near"].settings != both["far"].settings
    assert not both["near"].totals.is_floating_point()


def work_on_shard(rank, port, values):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for name, (metric, arguments, _) in CASES.items():
        metric = copy.deepcopy(metric)
        metric.update(*part(arguments, rank, N, 2))
        values[rank, name] = metric.compute().item()
    dist.destroy_process_group()


def test_two_processes_give_the_value_of_one():
    import socket

    import torch.multiprocessing as mp

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with mp.Manager() as manager:
        values = manager.dict()
        mp.spawn(work_on_shard, args=(port, values), nprocs=2)
        for name, (_, _, expected) in CASES.items():
            for rank in (0, 1):
                assert values[rank, name] == pytest.approx(float(expected), abs=2e-6), (name, rank)


def test_images_without_boxes_are_counted():
    metric = LocalizationError(oracle=True)
    metric.update(MAPS, BOXES)
    assert metric.without_boxes == 1
    assert metric.samples.sum() == N - 1


def test_facts_say_which_way_is_better():
    assert not LocalizationError.higher_is_better
    for metric in (Deletion, Infidelity, ModelRandomization, Sensitivity):
        assert not metric.higher_is_better
    for metric in (MaxBoxAcc, MaxBoxAccV2, PxAP, PointingGame, Insertion, ROAD):
        assert metric.higher_is_better
        assert not metric.is_differentiable


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="ids: expected those of the images"):
        LocalizationError().update(MAPS, BOXES)
    with pytest.raises(ValueError, match="ids: expected one for each of 14 samples, got 1"):
        LocalizationError().update(MAPS, BOXES, ["a"])
    with pytest.raises(ValueError, match="strategies: expected one of"):
        LocalizationError(["median"])
    with pytest.raises(ValueError, match="contours: expected one of"):
        MaxBoxAcc("exact")
    with pytest.raises(ValueError, match="classes: expected them with num_classes"):
        PointingGame().update(MAPS, BOXES, CLASSES)
    with pytest.raises(ValueError, match="classes: expected numbers from 0 to 1, got 2"):
        PointingGame(2).update(MAPS, BOXES, CLASSES)


def test_the_value_of_one_batch_may_be_nan_and_costs_nothing_of_what_was_added():
    metrics = [LocalizationError(), PxAP()]
    for metric, update in zip(metrics, [(MAPS, BOXES, IDS), (MAPS, MASKS)], strict=True):
        metric.update(*update)
        before = metric.compute()
        metric.reset()
        metric.update(*(u[:-1] for u in update))
        # One image lies in one fold, and this one's mask is taken away.
        last = [u[-1:] for u in update]
        if isinstance(metric, PxAP):
            assert metric(last[0], torch.zeros_like(last[1])).isnan()
        else:
            assert metric(*last).isnan()
            torch.testing.assert_close(metric.compute(), before)
        assert not metric.compute().isnan()


def test_metrics_with_other_settings_keep_to_themselves_in_a_collection():
    heat = torch.zeros(1, 40, 40)
    heat[0, 20, 20] = 1
    on, beside = torch.tensor([[20.0, 20.0, 22.0, 22.0]]), torch.tensor([[25.0, 20.0, 30.0, 25.0]])
    collection = MetricCollection(
        {"15": PointingGame(tolerance=15), "1": PointingGame(tolerance=1)}
    )
    collection.update(heat, [on])  # both hit, so their states are equal
    collection.update(heat, [beside])  # 5 px away
    assert {k: v.item() for k, v in collection.compute().items()} == {"15": 1.0, "1": 0.5}


def test_maps_may_have_the_one_channel_that_attributions_return():
    with_channel = {
        name: (metric, [a[:, None] if a is MAPS else a for a in arguments], value)
        for name, (metric, arguments, value) in CASES.items()
        if arguments[0] is MAPS
    }
    assert len(with_channel) > 6
    for name, (metric, arguments, value) in with_channel.items():
        fresh = copy.deepcopy(metric)
        fresh.update(*arguments)
        assert fresh.compute() == pytest.approx(value), name


def test_stability_takes_maps_with_one_channel():
    clean, attacked = MAPS[:3], torch.stack([MAPS[3:6], MAPS[6:9]])
    expected = F.stability(clean, attacked)
    for given in (
        F.stability(clean[:, None], attacked),
        F.stability(clean[:, None], attacked[:, :, None]),
        F.stability(clean, attacked[:, :, None]),
    ):
        assert all(torch.equal(given[name], expected[name]) for name in expected)
    single = F.stability(clean, attacked[0])
    channel = F.stability(clean[:, None], attacked[0][:, None])
    assert all(torch.equal(channel[name], single[name]) for name in single)
    # Three attacks on one image are no three images.
    several = F.stability(clean[:1], attacked[0][:, None], measures=["pearson"])["pearson"]
    apart = [F.pearson_correlation(clean[:1], a[None]) for a in attacked[0]]
    torch.testing.assert_close(several, torch.stack(apart).mean(dim=0))


def test_maps_of_several_channels_are_refused():
    with pytest.raises(ValueError, match="maps: expected N×H×W, got 14×3×30×40"):
        F.sweep_boxes(MAPS[:, None].expand(-1, 3, -1, -1))


@pytest.mark.parametrize("make", [LocalizationError, MaxBoxAcc, MaxBoxAccV2, PointingGame])
def test_boxes_of_the_image_are_refused_for_smaller_maps(make):
    maps, metric = torch.rand(2, 7, 7), make()
    inside = torch.tensor([[0.0, 0.0, 8.0, 7.5]])  # a pixel beyond is rounding
    ids = {"ids": ["a", "b"]} if make is LocalizationError else {}
    metric.update(maps, [inside, inside], **ids)
    for outside in ([64.0, 64.0, 192.0, 192.0], [0.0, 0.0, 5.0, 8.5], [-1.5, 0.0, 5.0, 5.0]):
        said = r"ground_truth\[1\]: expected boxes in pixels of the maps of 7×7, got"
        with pytest.raises(ValueError, match=said):
            metric.update(maps, [inside, torch.tensor([outside])], **ids)
