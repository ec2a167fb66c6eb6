"""Counts equal model-spec 1.3 to the parameter; FLOPs follow their formulas."""

import pytest

from ring_train.config import compose
from ring_train.plan import Cost, make_plan

# total, active with embedding and output, active without both, MTP total, MTP active
COUNTS = {
    "ring_mini_linear_2_0": (
        *(16_423_448_320, 1_600_777_984, 956_952_320),
        *(827_861_504, 47_720_960),
    ),
    "ring_flash_linear_2_0": (
        *(104_181_665_536, 7_444_238_080, 6_156_586_752),
        *(3_306_181_120, 185_618_944),
    ),
    "ling_mini_2_0": (16_255_643_392, 1_432_973_056, 789_147_392, 827_861_504, 47_720_960),
    "ling_flash_2_0": (
        *(102_889_705_216, 6_152_277_760, 4_864_626_432),
        *(3_306_181_120, 185_618_944),
    ),
    "ling_1t": (
        *(999_705_328_640, 51_054_427_136, 48_479_124_480),
        *(13_222_584_832, 740_336_128),
    ),
    "ring_lite": (16_801_974_272, 2_753_153_024, 2_235_156_480, 0, 0),
}


def cost(*words: str) -> Cost:
    return make_plan(compose("pretrain", list(words)), 1).cost


@pytest.mark.parametrize("preset", COUNTS)
def test_counts_equal_the_specification(preset: str) -> None:
    found = cost(f"model={preset}")
    assert (
        found.num_parameters,
        found.num_active_parameters,
        found.num_active_non_embedding_parameters,
        found.num_mtp_parameters,
        found.num_active_mtp_parameters,
    ) == COUNTS[preset]


def test_counts_do_not_depend_on_the_layout() -> None:
    alone = cost("model=tiny")
    config = compose("pretrain", ["model=tiny", "parallel=pp2"])
    assert make_plan(config, 4).cost == alone


@pytest.mark.parametrize(
    ("preset", "seq_length", "gflops"),
    # Published anchors to two digits, MTP excluded.
    [
        ("ring_mini_linear_2_0", 4096, 7.9),
        ("ring_mini_linear_2_0", 32768, 9.4),
        ("ring_flash_linear_2_0", 4096, 41.4),
        ("ring_flash_linear_2_0", 131072, 53.9),
    ],
)
def test_training_flops_agree_with_published_anchors(
    preset: str, seq_length: int, gflops: float
) -> None:
    found = cost(f"model={preset}", f"train.seq_length={seq_length}", "model.mtp_num_layers=0")
    assert found.flops_per_token / 1e9 == pytest.approx(gflops, rel=0.02)


def test_flops_of_a_dense_softmax_model_are_the_textbook_formula() -> None:
    words = ["model=tiny", "train=cpu", "optim=short", "model.layer_group_size=1"]
    words += ["model.num_moe_experts=null", "model.mtp_num_layers=0", "model.qk_layernorm=false"]
    found = cost(*words)
    h, f, n, g, d, layers, v, s = 64, 128, 4, 2, 16, 4, 512, 256
    matrices = layers * (h * (2 * n + 2 * g) * d + 3 * h * f) + h * v
    attention = layers * 2 * s * n * d
    assert found.flops_per_token == 3 * (2 * matrices + attention)


def test_flops_of_lightning_do_not_grow_with_the_row() -> None:
    short, long = (
        cost("model=tiny", f"train.seq_length={s}", "model.mtp_num_layers=0") for s in (256, 512)
    )
    softmax_layers, n, d = 2, 4, 16
    growth = 3 * softmax_layers * 2 * 256 * n * d
    assert long.flops_per_token - short.flops_per_token == growth
