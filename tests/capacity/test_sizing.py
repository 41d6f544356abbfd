"""The capacity model: held to published measurements, to the model's own arithmetic, and to common sense."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from nvila.capacity import load, sizing
from nvila.capacity.hardware import GPUS, gpus_needed, throughput
from nvila.capacity.load import EXAMPLES, MIXES, Arrival, Ask, demand, read_trace
from nvila.capacity.models import PUBLISHED, llm_parameters, nvila_8b, nvila_8b_video, nvila_15b
from nvila.capacity.plot import draw, nice_ticks
from nvila.capacity.rules import DECODE_RAY, VISION
from nvila.capacity.simulate import Plan, simulate
from nvila.capacity.sizing import Assumptions, size_for_gpus, size_for_rate
from nvila.decode.build import LONGEST_DEFAULT
from nvila.errors import InvalidRequest, LimitExceeded
from nvila.gateway.settings import GatewaySettings

H100 = GPUS["h100"]


def test_the_assumed_shares_give_what_was_measured_on_an_a100() -> None:
    """github.com/NVlabs/VILA README: NVILA-8B decodes 82.1 tokens/s, 64 frames take NVILA-8B-Video 0.719 s."""
    a100 = GPUS["a100"]
    short = throughput(nvila_8b(), a100, a100, mean_positions=1000)
    video = throughput(nvila_8b_video(), a100, a100, mean_positions=2056)
    wanted = demand(nvila_8b_video(), Ask(kind="video", frames=64, prompt_tokens=20))

    assert 1 / short.step_s == pytest.approx(82.1, rel=0.1)
    assert wanted.tiles / video.tiles_per_s + wanted.positions / video.positions_per_s == pytest.approx(0.719, rel=0.1)


@pytest.mark.parametrize(("make", "billions"), list(zip(PUBLISHED, (7.62, 7.62, 14.77, 7.62, 1.54), strict=True)))
def test_the_shapes_have_the_weights_of_their_language_models(make: object, billions: float) -> None:
    assert callable(make)
    assert llm_parameters(make().llm) / 1e9 == pytest.approx(billions, rel=0.01)


def test_a_video_of_256_frames_costs_what_the_specification_says() -> None:
    wanted = demand(nvila_8b_video(), Ask(kind="video", frames=256, prompt_tokens=0))

    assert (wanted.tiles, wanted.positions, wanted.record_bytes) == (256, 8224, 58_720_256)
    assert wanted.chunks == (32,) * 8


def test_reused_media_cost_no_tower_and_the_same_prompt() -> None:
    fresh, reused = (demand(nvila_8b_video(), Ask(kind="video", frames=64, reused=flag)) for flag in (False, True))

    assert reused.tiles == 0
    assert reused.positions == fresh.positions


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("gpus", [1, 2, 3, 8, 100, 4096])
def test_what_gpus_can_serve_needs_no_more_than_them(mix: str, gpus: int) -> None:
    rates = sizing.rates_for(nvila_8b_video(), MIXES[mix], H100, H100)
    each = sizing.cost_of(nvila_8b_video(), MIXES[mix], rates)
    filled = size_for_gpus(each, rates, gpus, Assumptions())

    assert filled.gpus <= gpus
    if not filled.is_shared:
        again = size_for_rate(each, rates, filled.requests_per_s, Assumptions())
        assert (again.vision_gpus, again.decode_gpus) <= (filled.vision_gpus, filled.decode_gpus)


def test_more_gpus_never_serve_less() -> None:
    rates = sizing.rates_for(nvila_8b_video(), MIXES["mixed"], H100, H100)
    each = sizing.cost_of(nvila_8b_video(), MIXES["mixed"], rates)
    served = [size_for_gpus(each, rates, gpus, Assumptions()).requests_per_s for gpus in range(2, 200)]

    assert served == sorted(served)


def test_redis_is_counted_by_what_passes_and_by_what_stays() -> None:
    rates = sizing.rates_for(nvila_8b_video(), MIXES["video"], H100, H100)
    each = sizing.cost_of(nvila_8b_video(), MIXES["video"], rates)
    passing = size_for_rate(each, rates, 100, Assumptions(ttl_s=1))
    staying = size_for_rate(each, rates, 100, Assumptions(ttl_s=3600))

    assert passing.redis_bytes_per_s == pytest.approx(100 * 2 * 58_720_256)
    assert passing.redis == 17  # 11.7 GB/s over 60 % of 1.2 GB/s
    assert staying.redis == 331  # 21 TB over 64 GB


def test_a_model_that_does_not_fit_is_spread_or_refused() -> None:
    assert gpus_needed(nvila_15b(), GPUS["l4"]) == 2
    with pytest.raises(LimitExceeded, match="NVILA-15B on 1 × l4"):
        throughput(nvila_15b(), GPUS["l4"], GPUS["l4"])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", json.dumps([{"time": 5, "kind": "video", "frames": 64}, {"time": 3, "answer_tokens": 9}])),
        ("b.json", json.dumps({"requests": [{"t": 3, "kind": "text", "answer": 9}, {"t": 5, "frames": 64}]})),
        ("c.jsonl", '{"time_s": 5, "kind": "video", "tiles": 64}\n\n{"time_s": 3, "output_tokens": 9}\n'),
        ("d.csv", "time,kind,frames,prompt_tokens,answer_tokens\n5,video,64,,\n3,text,,,9\n"),
        ("e.csv", "TIMESTAMP,NumFrames,GeneratedTokens\n2026-01-02 00:00:01.5,64,\n2026-01-01T23:59:59.5Z,,9\n"),
    ],
)
def test_traces_are_read_in_any_of_their_forms(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)

    assert read_trace(tmp_path / name) == [
        Arrival(0.0, Ask(kind="text", answer_tokens=9)),
        Arrival(2.0, Ask(kind="video", frames=64)),
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "holds no request"),
        ('[{"kind": "text"}]', "request 1 has no `time`"),
        ('[{"time": 1}, {"time": "soon"}]', "request 2: time is 'soon'"),
        ('[{"time": 1, "kind": "audio"}]', "kind 'audio'; known are text, image, video"),
        ('[{"time": 1, "frames": -3}]', "frames is -3"),
        ('[{"time": NaN}]', "time is nan"),
        ('{"time": 1', "neither JSON nor JSON lines"),
        ("[3]", "3 is not an object"),
        ('[{"time": 0}, {"time": 1e9}]', "spans 1,000,000,000 s"),
    ],
)
def test_a_wrong_trace_says_which_request_and_which_field(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "trace.json").write_text(text)

    with pytest.raises(InvalidRequest) as caught:
        read_trace(tmp_path / "trace.json")
    assert said in caught.value.message


def test_several_images_of_a_request_are_one_tile_each(tmp_path: Path) -> None:
    (tmp_path / "trace.csv").write_text("time,num images\n0,1\n1,5\n2,0\n")

    assert [one.ask for one in read_trace(tmp_path / "trace.csv")] == [
        Ask(kind="image"),
        Ask(kind="image", tiles=5),
        Ask(kind="text"),
    ]


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (Ask(kind="video", frames=256), ""),
        (Ask(kind="video", frames=300), "300 frames, at most 256"),
        (Ask(answer_tokens=10_000), "10,000 tokens of answer, at most 8,192"),
        (Ask(kind="image", tiles=10**12), "1,000,000,000,000 tiles"),
        (Ask(prompt_tokens=40_000), "40,200 positions, at most 32,768"),
    ],
)
def test_what_the_gateway_would_refuse_is_told(ask: Ask, said: str) -> None:
    assert load.refusal(nvila_8b_video(), ask).startswith(said)
    assert bool(load.refusal(nvila_8b_video(), ask)) is bool(said)


def test_the_limits_are_the_programs_own() -> None:
    assert GatewaySettings.model_fields["max_frames"].default == load.MOST_FRAMES
    assert GatewaySettings.model_fields["max_answer_tokens"].default == load.MOST_ANSWER_TOKENS
    assert load.MOST_POSITIONS == LONGEST_DEFAULT


def test_the_examples_are_made_by_their_seed() -> None:
    for make in EXAMPLES.values():
        assert make(7, 0.05) == make(7, 0.05) != make(8, 0.05)


def test_mixes_add_up() -> None:
    for mix in load.MIXES.values():
        assert sum(share for share, _ in mix.shares) == pytest.approx(1)


def test_a_simulation_is_drawn_as_a_picture(tmp_path: Path) -> None:
    rates = throughput(nvila_8b_video(), H100, H100)
    record = simulate(
        nvila_8b_video(), rates, EXAMPLES["image-to-text"](0, 0.05), Plan(vision=VISION, decode=DECODE_RAY)
    )
    draw(record, tmp_path / "a.png", "title", "subtitle")

    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width == 1180
        assert len(picture.convert("RGB").getcolors(1 << 24) or ()) > 50


@pytest.mark.parametrize(
    ("most", "is_whole", "ticks"),
    [(0, False, [0, 1]), (7, True, [0, 2, 4, 6, 8]), (0.9, False, [0, 0.2, 0.4, 0.6, 0.8, 1])],
)
def test_ticks_are_round_numbers(most: float, is_whole: bool, ticks: list[float]) -> None:
    assert nice_ticks(most, is_whole=is_whole) == pytest.approx(ticks)
