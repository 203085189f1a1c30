import json
import re
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from intarsia.ir import registry
from intarsia.models import base
from intarsia.models.base import Model, UnknownModel, WeightsMismatch, WeightsNotFound, WeightsUnreadable, find, load


class Small(nn.Module):
    _keep_in_fp32_modules = ("scale",)

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.second = nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.ones(4))
        self.register_buffer("table", torch.arange(4.0), persistent=False)
        self.register_buffer("count", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x) * self.scale + self.get_buffer("table"))
        return y


SMALL = Model(
    name="small",
    summary="two layers",
    source="this test",
    dtype=torch.float32,
    build=lambda: Small().eval(),
    inputs=lambda: {"x": torch.ones(2, 3)},
    outputs=("y",),
)


@pytest.fixture
def state() -> dict[str, Tensor]:
    torch.manual_seed(5)
    return Small().state_dict() | {"count": torch.tensor(7)}


def small() -> Model:
    return SMALL


def test_every_listed_name_finds_the_model_of_that_name() -> None:
    assert [find(name).name for name in base.MODELS] == list(base.MODELS)


def test_an_unknown_name_is_told_the_nearest_and_all_known() -> None:
    expected = f"model 'wan-minni' is unknown; did you mean wan-mini? Known: {', '.join(base.MODELS)}"
    with pytest.raises(UnknownModel, match=f"^{re.escape(expected)}$"):
        find("wan-minni")


def test_a_name_like_no_other_gets_no_guess() -> None:
    with pytest.raises(UnknownModel, match=r"^model '§' is unknown\. Known: "):
        find("§")


def test_other_packages_join_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint(name="small", value=f"{__name__}:small", group=base.ENTRY_POINTS)
    monkeypatch.setattr(EntryPoint, "load", lambda self: small)
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry])
    assert find("small") is SMALL
    assert base.names() == (*base.MODELS, "small")


def test_a_file_is_loaded_exactly(tmp_path: Path, state: dict[str, Tensor]) -> None:
    save_file(state, tmp_path / "w.safetensors")
    module = load(SMALL, weights=tmp_path / "w.safetensors")
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert not module.training
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_tables_that_no_file_holds_have_their_values(tmp_path: Path, state: dict[str, Tensor]) -> None:
    save_file(state, tmp_path / "w.safetensors")
    assert load(SMALL, weights=tmp_path).get_buffer("table").tolist() == [0.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize("place", ["", "transformer"])
def test_a_sharded_folder_is_read_by_its_index(tmp_path: Path, state: dict[str, Tensor], place: str) -> None:
    folder = tmp_path / place
    folder.mkdir(exist_ok=True)
    shards = {name: f"part-{index % 2}.safetensors" for index, name in enumerate(state)}
    for shard in set(shards.values()):
        save_file({name: state[name] for name in state if shards[name] == shard}, folder / shard)
    save_file({"not.listed": torch.ones(1)}, folder / "other.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    module = load(SMALL, weights=tmp_path)
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


def test_several_files_without_an_index_are_read_together(tmp_path: Path, state: dict[str, Tensor]) -> None:
    for index, (name, value) in enumerate(state.items()):
        save_file({name: value}, tmp_path / f"{index}.safetensors")
    assert torch.equal(load(SMALL, weights=tmp_path).get_parameter("scale"), state["scale"])


def test_half_precision_leaves_alone_what_must_stay_f32(tmp_path: Path, state: dict[str, Tensor]) -> None:
    save_file(state, tmp_path / "w.safetensors")
    module = load(SMALL, weights=tmp_path, dtype=torch.bfloat16)
    dtypes = {name: value.dtype for name, value in [*module.named_parameters(), *module.named_buffers()]}
    assert {name for name, dtype in dtypes.items() if dtype == torch.bfloat16} == {
        "first.weight",
        "first.bias",
        "second.weight",
        "second.bias",
    }
    assert dtypes["scale"] == dtypes["table"] == torch.float32
    assert dtypes["count"] == torch.int64


def test_without_weights_the_random_ones_are_the_same_each_time_and_disturb_nothing() -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first, second = load(SMALL), load(SMALL)
    assert torch.equal(first.get_parameter("first.weight"), second.get_parameter("first.weight"))
    assert torch.equal(before, torch.random.get_rng_state())


def test_all_that_differs_is_told_at_once(tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = tmp_path / "w.safetensors"
    wrong = {name: value for name, value in state.items() if not name.startswith("second")}
    save_file(wrong | {"third.bias": torch.ones(1), "scale": torch.ones(5)}, path)
    expected = (
        f"weights {path} are not small's: 2 missing: second.bias, second.weight; 1 unexpected: third.bias; "
        "1 mis-shaped: scale is (5,), not (4,)"
    )
    with pytest.raises(WeightsMismatch, match=f"^{re.escape(expected)}$"):
        load(SMALL, weights=path)


def test_a_long_list_is_cut_and_counted(tmp_path: Path) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / "w.safetensors")
    with pytest.raises(
        WeightsMismatch, match=r"6 missing: count, first.bias, first.weight and 3 more; 1 unexpected: x"
    ):
        load(SMALL, weights=tmp_path)


def test_a_missing_path_and_an_empty_folder_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(WeightsNotFound, match=r"absent: does not exist$"):
        load(SMALL, weights=tmp_path / "absent")
    with pytest.raises(WeightsNotFound, match=r"holds no \*\.safetensors, nor does its transformer/$"):
        load(SMALL, weights=tmp_path)


def test_a_shard_that_is_absent_is_named(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors.index.json").write_text('{"weight_map": {"scale": "part-1.safetensors"}}')
    with pytest.raises(WeightsNotFound, match=r"lists part-1.safetensors, which the folder does not hold$"):
        load(SMALL, weights=tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_broken_index_is_told(tmp_path: Path, content: str) -> None:
    (tmp_path / "m.safetensors.index.json").write_text(content)
    with pytest.raises(WeightsUnreadable, match="no index of shards"):
        load(SMALL, weights=tmp_path)


def test_a_file_cut_short_is_told(tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = tmp_path / "w.safetensors"
    save_file(state, path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(WeightsUnreadable, match="not a whole safetensors file"):
        load(SMALL, weights=path)
