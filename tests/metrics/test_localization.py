from hashlib import blake2b

import numpy as np
import pytest
import torch

from captum_robust.metrics import LocalizationError
from captum_robust.metrics import functional as F
from captum_robust.metrics.functional import (
    PROTOCOLS,
    alpha_grid,
    bootstrap_interval,
    gt_known_localization,
    localization_error,
    split_folds,
    top1_localization,
)

NAN = float("nan")


def test_an_overlap_of_exactly_half_is_wrong_for_whi_and_right_for_fong():
    ious = torch.tensor([[0.5], [0.6], [0.4], [0.9]])
    error = {p: localization_error(ious, alphas=[0], protocol=p).error for p in PROTOCOLS}
    assert error["whi2020"] == 0.5
    assert error["fong2017"] == 0.25
    assert error["maxboxacc"] == 0.25
    # Errors .0 at IoU ≥ .3, .25 at ≥ .5 and .75 at ≥ .7.
    assert error["maxboxacc_v2"] == pytest.approx((0 + 0.25 + 0.75) / 3)


def test_the_protocol_s_rule_can_be_replaced():
    ious = torch.tensor([[0.5], [0.6], [0.4], [0.9]])
    assert localization_error(ious, alphas=[0], strict=False).error == 0.25
    assert localization_error(ious, alphas=[0], iou_threshold=0.85).error == 0.75
    assert localization_error(ious, alphas=[0], protocol="fong2017", strict=True).error == 0.5


def test_each_fold_is_scored_with_the_threshold_of_the_other():
    # Fold 0 is all right at the first threshold, fold 1 at the second; so each gets the other's.
    ious = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.1, 0.9], [0.1, 0.9]])
    folds = torch.tensor([0, 0, 1, 1])
    result = localization_error(ious, alphas=[0.2, 0.7], folds=folds)
    assert result.error == 1
    assert result.chosen == ((("energy", 0.7),), (("energy", 0.2),))
    assert not result.oracle


def test_the_oracle_tunes_on_what_it_reports_and_says_so():
    ious = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.1, 0.9], [0.9, 0.9]])
    result = localization_error(ious, alphas=[0.2, 0.7], oracle=True)
    assert result.error == 0.25
    assert result.chosen == ((("energy", 0.2),),)
    assert result.oracle
    assert result.correct.tolist() == [True, True, False, True]


def test_the_family_is_tuned_along_with_alpha():
    bad = torch.full((6, 20), 0.1)
    good = bad.clone()
    good[:, 5] = 0.9
    result = localization_error({"value": bad, "energy": good}, seed=1)
    assert result.error == 0
    assert result.chosen == ((("energy", 0.25),),) * 2


def test_of_thresholds_with_as_many_correct_boxes_the_larger_overlap_is_chosen():
    # Two of three right at each; mean overlaps .5, .6 and .6 (worked by hand).
    ious = torch.tensor([[0.6, 0.9, 0.9], [0.8, 0.8, 0.8], [0.1, 0.1, 0.1]])
    result = localization_error(ious, alphas=[0.2, 0.5, 0.7], oracle=True)
    assert result.chosen == ((("energy", 0.5),),)
    # A larger overlap does not make up for a box less.
    ious = torch.tensor([[0.51, 1.0], [0.51, 0.4]])
    assert localization_error(ious, alphas=[0.2, 0.7], oracle=True).chosen[0][0][1] == 0.2


def test_the_overlaps_of_samples_that_do_not_count_tune_nothing():
    ious = torch.tensor([[0.6, 0.7], [0.9, 0.1], [torch.nan, torch.nan]])
    result = localization_error(
        ious, alphas=[0.2, 0.7], oracle=True, blacklist=torch.tensor([False, True, False])
    )
    assert result.chosen == ((("energy", 0.7),),)


def test_of_equally_good_thresholds_the_first_is_chosen():
    result = localization_error(torch.full((4, 20), 0.9), oracle=True, strategy="value")
    assert result.chosen == ((("value", 0.0),),)


def test_samples_without_boxes_and_blacklisted_ones_do_not_count():
    ious = torch.tensor([[0.9], [NAN], [0.1], [0.1], [NAN]])
    result = localization_error(
        ious, alphas=[0], ids=["a", "b", "c", "d", "e"], blacklist={"c", "e", "z"}
    )
    assert (result.n, result.without_boxes, result.blacklisted) == (2, 2, 1)
    assert result.error == 0.5
    assert result.scored.tolist() == [True, False, False, True, False]
    mask = torch.tensor([False, False, True, False, True])
    assert localization_error(ious, alphas=[0], blacklist=mask).n == 2


@pytest.mark.parametrize(
    "ids",
    [
        torch.arange(5),
        np.arange(5),
        list(torch.arange(5)),
        range(5),
        np.arange(5.0),  # as a column of a table with a gap comes
        list(np.arange(5, dtype=np.float32)),
        [b"0", b"1", b"2", b"3", b"4"],
        np.array(["0", "1", "2", "3", "4"], dtype="S1"),  # as from HDF5
    ],
)
@pytest.mark.parametrize("listed", [[1, 4], {"1", "4"}, torch.tensor([1, 4]), np.array([1, 4])])
def test_ids_and_blacklists_are_the_same_as_tensors_arrays_and_text(ids, listed):
    heat = torch.zeros(5, 8, 8)
    heat[:, 2:4, 1:6] = 1
    boxes = [torch.tensor([[1.0, 2.0, 6.0, 4.0]])] * 5
    metric = LocalizationError(["value"], oracle=True, blacklist=listed)
    metric.update(heat, boxes, ids)
    assert metric.samples.tolist() == [3, 0]
    ious = F.best_iou(F.sweep_boxes(heat, ["value"])["value"], boxes)
    result = localization_error({"value": ious}, ids=ids, oracle=True, blacklist=listed)
    assert (result.n, result.blacklisted) == (3, 2)
    assert split_folds(ids).tolist() == split_folds(5).tolist()


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("blacklist", "12", "blacklist: expected a collection of ids, got the text '12'"),
        ("ids", "01234", "ids: expected a collection of ids, got the text '01234'"),
        ("ids", torch.zeros(5, 1), "ids: expected one id a sample, got 2 dimensions"),
        ("blacklist", [True, False] * 2, "blacklist: expected ids, got truth values"),
    ],
)
def test_a_text_is_no_collection_of_ids(name, given, message):
    arguments = {"ids": list("01234"), "blacklist": ["1"]} | {name: given}
    with pytest.raises((TypeError, ValueError), match=message):
        localization_error({"value": torch.rand(5, 3)}, alphas=[0, 1, 2], oracle=True, **arguments)
    if name == "blacklist":
        with pytest.raises(TypeError, match=message):
            LocalizationError(blacklist=given)


def test_blacklisted_samples_do_not_tune_the_threshold():
    ious = torch.tensor([[0.9, 0.1], [0.1, 0.9], [0.1, 0.9]])
    listed = torch.tensor([False, True, True])
    result = localization_error(ious, alphas=[0, 1], oracle=True, blacklist=listed)
    assert result.error == 0


def test_per_sample_errors_average_to_the_error_and_feed_the_bootstrap():
    ious = torch.rand(50, 20, generator=torch.Generator().manual_seed(0))
    ious[7] = NAN
    for protocol in PROTOCOLS:
        result = localization_error(ious, protocol=protocol)
        interval = bootstrap_interval(result.per_sample_error, resamples=50)
        assert interval.mean == pytest.approx(result.error)
        assert interval.n == result.n == 49
        shape = (50, 3) if protocol == "maxboxacc_v2" else (50,)
        assert result.correct.shape == shape


def test_every_overlap_of_v2_gets_a_threshold_of_its_own():
    ious = torch.tensor([[0.45, 0.75], [0.45, 0.1]])
    result = localization_error(ious, protocol="maxboxacc_v2", alphas=[0, 1], oracle=True)
    # IoU ≥ .3: both right at the first; ≥ .5 and ≥ .7: one right at the second.
    assert [alpha for _, alpha in result.chosen[0]] == [0, 1, 1]
    assert result.error == pytest.approx(1 / 3)


def test_ids_keep_their_fold_in_any_order_and_company():
    ids = [f"ILSVRC2012_val_{i:08d}" for i in range(1, 2001)]
    folds = split_folds(ids)
    assert (split_folds(ids[::-1]).flip(0) == folds).all()
    assert (split_folds(ids[100:110]) == folds[100:110]).all()
    assert 900 < folds.sum() < 1100  # 4.5 standard deviations
    assert (split_folds(ids, seed=1) == folds).float().mean() == pytest.approx(0.5, abs=0.05)


def test_a_fold_is_the_last_bit_of_the_hash_of_seed_and_id():
    expected = [blake2b(f"5:{i}".encode(), digest_size=1).digest()[0] % 2 for i in range(50)]
    assert split_folds(list(range(50)), seed=5).tolist() == expected


def test_a_number_of_samples_stands_for_their_numbers():
    assert (split_folds(50, seed=5) == split_folds([str(i) for i in range(50)], seed=5)).all()
    assert (split_folds(50, seed=5)[:20] == split_folds(20, seed=5)).all()
    assert not (split_folds(50, seed=5) == split_folds(50, seed=6)).all()
    with pytest.raises(TypeError, match="samples: expected a number or a sequence of ids"):
        split_folds("cat.jpg")


def test_an_empty_fold_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match="oracle=True"):
        localization_error(torch.rand(3, 20), folds=torch.zeros(3, dtype=torch.int64))


def test_nothing_to_score_is_refused():
    with pytest.raises(
        ValueError, match="expected a sample to score, got 2, of which 2 have no box"
    ):
        localization_error(torch.full((2, 20), NAN))
    with pytest.raises(ValueError, match="expected a sample to score"):
        localization_error(torch.zeros(0, 20))


def test_wrong_arguments_are_named():
    ious = torch.rand(4, 20)
    with pytest.raises(ValueError, match="protocol: expected one of fong2017, maxboxacc"):
        localization_error(ious, protocol="whi")
    with pytest.raises(ValueError, match="column for each of 21 alphas, got 20"):
        localization_error(ious, strategy="mean")
    with pytest.raises(ValueError, match="ids: expected one for each of 4 samples, got 1"):
        localization_error(ious, ids=["a"])
    with pytest.raises(ValueError, match="ids: expected those of the samples, for the blacklist"):
        localization_error(ious, blacklist=["a"])
    with pytest.raises(ValueError, match="folds: expected 4 zeros and ones"):
        localization_error(ious, folds=torch.tensor([0, 1, 2, 0]))
    with pytest.raises(ValueError, match=r"as many samples in every family, got \[2, 4\]"):
        localization_error({"value": ious, "energy": ious[:2]})
    assert len(alpha_grid("value")) == 20


def test_top1_localization_asks_for_box_and_class():
    box = torch.tensor([True, True, False, False])
    label = torch.tensor([True, False, True, False])
    assert gt_known_localization(box) == 0.5
    assert top1_localization(box, label) == 0.25
    with pytest.raises(ValueError, match="correct_class: expected the shape of correct_box"):
        top1_localization(box, label[:2])


def test_ids_are_the_same_as_whole_numbers_in_floating_point_and_from_a_generator() -> None:
    maps, boxes = torch.zeros(8, 6, 6), [torch.tensor([[1.0, 2, 5, 4]])] * 8
    maps[:, 2:4, 1:5] = 1
    expected = torch.bincount(split_folds([str(i) for i in range(2, 8)]), minlength=2)
    for blacklist in ([0, 1], [0.0, 1.0], np.float32([0, 1]), [np.float32(0), "1"]):
        for ids in (range(8), torch.arange(8.0), (float(i) for i in range(8))):
            metric = LocalizationError(["value"], blacklist=blacklist)
            metric.update(maps, boxes, ids)
            assert metric.samples.equal(expected)
    assert split_folds([0.5, 3.0]).equal(split_folds(["0.5", "3"]))
