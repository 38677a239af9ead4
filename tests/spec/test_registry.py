"""The open registry: kinds are found by file name, by entry point, and in the process; nothing else is imported."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import ClassVar

import pytest

from torchstone import spec
from torchstone.errors import TorchstoneError
from torchstone.model.norm import NormSpec
from torchstone.model.norm.rmsnorm import RMSNormSpec
from torchstone.model.transformer import TransformerSpec
from torchstone.spec import family_root, kinds, resolve, validate

MODEL_FAMILIES = [family for family, home in spec.FAMILIES.items() if home.startswith("torchstone.model.")]


def run(code: str, *, path: Path | None = None) -> str:
    """What a fresh process prints."""
    env = {**os.environ, **({"PYTHONPATH": str(path)} if path else {})}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("family", MODEL_FAMILIES)
def test_kind_is_the_name_of_its_file(family: str) -> None:
    home = Path(__import__("importlib").import_module(spec.FAMILIES[family]).__file__).parent
    files = {path.stem for path in home.glob("*.py") if not path.stem.startswith("_")}
    assert set(kinds(family)) == {name for name in files if resolve(family, name).offered}
    for kind in files:
        cls = resolve(family, kind)
        assert (cls.family, cls.kind) == (family, kind) and issubclass(cls, family_root(family))


@pytest.mark.parametrize("family", MODEL_FAMILIES)
def test_every_kind_and_field_is_documented(family: str) -> None:
    for kind in kinds(family):
        cls = resolve(family, kind)
        assert cls.__doc__ and 10 < len(cls.summary()) < 120, f"{family} {kind} has no summary of one line"
        for name, info in cls.model_fields.items():
            assert info.description, f"{family}.{kind}.{name} has no description"


def test_building_a_softmax_model_imports_no_other_attention_and_no_other_position() -> None:
    loaded = run(
        """
        import sys
        from torchstone.model.transformer import TransformerSpec
        from torchstone.spec import validate
        validate(TransformerSpec, {"vocabulary": 9, "width": 16, "attention": {"heads": 2}}).build()
        print(" ".join(sorted(name for name in sys.modules if name.startswith("torchstone."))))
        """
    ).split()
    for family in ("attention", "position", "feedforward", "residual", "norm", "linear", "block", "stack"):
        prefix = f"torchstone.model.{family}."
        files = {name.removeprefix(prefix) for name in loaded if name.startswith(prefix)}
        usual = {
            "attention": {"softmax", "_heads"}, "position": {"rotary", "scaling"}, "feedforward": {"swiglu", "_gated"},
            "residual": {"pre"}, "norm": {"rmsnorm"}, "linear": {"dense"}, "block": {"sequential"}, "stack": {"plain"},
        }[family]  # fmt: skip
        assert files == usual, family
    assert not [name for name in loaded if name.split(".")[1] in ("data", "train", "cli", "generate", "interop")]


def test_class_is_imported_from_its_family_without_the_others() -> None:
    printed = run(
        """
        import sys
        from torchstone.model.position import AlibiPosition
        print(AlibiPosition.__module__, "torchstone.model.position.rotary" in sys.modules)
        """
    )
    assert printed == "torchstone.model.position.alibi False"
    import torchstone.model.feedforward as family

    assert family.SwiGLUSpec.kind == "swiglu"
    with pytest.raises(AttributeError, match="has no attribute 'NoSuchThing'"):
        family.NoSuchThing  # noqa: B018


def test_unknown_kind_is_one_sentence_with_the_nearest_and_all_kinds() -> None:
    with pytest.raises(TorchstoneError) as caught:
        validate(TransformerSpec, {"position": {"kind": "rotery"}})
    allowed = ", ".join(kinds("position"))
    assert str(caught.value) == f"position: no position kind 'rotery' (did you mean 'rotary'?); kinds: {allowed}"
    with pytest.raises(TorchstoneError, match="no position kind 'x'; kinds:"):
        resolve("position", "x")


@pytest.mark.parametrize("kind", ["", "__init__", "_gated", "os.path", "../softmax", "a b", "scaling/yarn"])
def test_names_that_are_no_kinds_import_nothing(kind: str) -> None:
    for family in ("ffn", "position"):
        with pytest.raises(TorchstoneError, match=f"no {family} kind"):
            resolve(family, kind)


def test_subpackage_of_a_family_is_no_kind_of_it() -> None:
    assert "scaling" not in kinds("position")
    with pytest.raises(TorchstoneError, match="no position kind 'scaling'"):
        resolve("position", "scaling")


def test_unknown_family_is_one_sentence() -> None:
    with pytest.raises(TorchstoneError, match=r"no family 'atention' \(did you mean 'attention'\?\); families: "):
        family_root("atention")


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (
            {"attention": {"kind": "softmax", "windw": 3}},
            r"attention: no field 'windw' \(did you mean 'window'\?\); fields: kind, heads, ",
        ),
        ({"widht": 3}, r"recipe: no field 'widht' \(did you mean 'width'\?\)"),
        (
            {"position": {"kind": "rotary", "scaling": {"kind": "yarn", "factor": 2}}},
            r"position.scaling.original: is required",
        ),
        (
            {"position": {"kind": "rotary", "scaling": {"kind": "yarn", "factr": 2, "original": 8, "factor": 1}}},
            r"position.scaling: no field 'factr' \(did you mean 'factor'\?\)",
        ),
        ({"attention": {"heads": 0}}, r"attention.heads: input should be greater than or equal to 1, got '0'"),
        ({"attention": {"heads": 3}, "width": 32}, r"attention.heads: 3 heads do not divide width 32"),
        ({"attention": 3}, r"attention: needs a kind or a mapping with 'kind', not 3"),
        (
            {"embedding": {"norm": {"kind": "layrnorm"}}},
            r"embedding.norm: no norm kind 'layrnorm' \(did you mean 'layernorm'\?\)",
        ),
        ({"layers": [{"at": [9], "ffn": "mlp"}], "depth": 2}, r"layers.0.at: no layer 9 among 2 layers"),
        (
            {"layers": [{"at": [1], "ffn": {"kind": "mlpp"}}], "depth": 2},
            r"layers.0.ffn: no ffn kind 'mlpp' \(did you mean 'mlp'\?\)",
        ),
        ({"encoder": {"depth": 0}}, r"encoder.depth: needs a whole number from 1 to 10000, got 0"),
        ({"encoder": {"heads": 2}}, r"encoder: no field 'heads'"),
        ({"encoder": {"depth": 1}, "causal": False}, r"encoder: an encoder-decoder needs causal: true"),
        ({"encoder": {"depth": 1}, "block": "parallel"}, r"block parallel has no place for a cross-attention"),
        ({"norm": {"kind": "rmsnorm", "eps": float("nan")}}, r"norm.eps: "),
        (
            {"position": {"kind": "rotary", "fraction": 0.1}, "width": 32, "attention": {"heads": 4}},
            r"rotary turns pairs of channels",
        ),
    ],
)
def test_wrong_input_is_one_sentence_with_the_path(data: dict, sentence: str) -> None:
    with pytest.raises(TorchstoneError, match=sentence) as caught:
        validate(TransformerSpec, data)
    assert "\n" not in str(caught.value) and "did you mean 'kind'" not in str(caught.value)


# ------------------------------------------------------------------------------------------- parts from elsewhere


@pytest.fixture
def _forgotten():  # type: ignore[no-untyped-def]
    before = dict(spec._KINDS["norm"])
    yield
    spec._KINDS["norm"].clear()
    spec._KINDS["norm"].update(before)


def test_part_defined_in_this_process_is_a_kind_like_any_other(_forgotten: None) -> None:
    class HalfSpec(RMSNormSpec):
        """Root-mean-square norm, halved."""

        kind: ClassVar[str] = "half"

    assert "half" in kinds("norm") and resolve("norm", "half") is HalfSpec
    built = validate(TransformerSpec, {"norm": {"kind": "half", "eps": 0.5}})
    assert isinstance(built.norm, HalfSpec) and built.dump()["norm"] == {"kind": "half", "eps": 0.5, "gain": True}
    assert "norm.half" in spec.json_schema(TransformerSpec)["$defs"]


def test_two_parts_of_one_kind_are_refused(_forgotten: None) -> None:
    with pytest.raises(TypeError, match="norm kind 'rmsnorm' is defined twice"):

        class Other(NormSpec):
            """Another."""

            kind: ClassVar[str] = "rmsnorm"


def test_class_outside_the_package_that_names_no_kind_is_a_base(_forgotten: None) -> None:
    class Base(NormSpec):
        """A base."""

    assert Base not in spec._KINDS["norm"].values()


def test_part_of_another_distribution_is_found_by_its_entry_point(tmp_path: Path) -> None:
    (tmp_path / "stranger.py").write_text(
        textwrap.dedent(
            '''
            from typing import ClassVar
            from torch import nn
            from torchstone.model.feedforward import FeedForward, FeedForwardSpec

            class IdleSpec(FeedForwardSpec):
                """A feed-forward that scales by a learned number."""
                kind: ClassVar[str] = "idle"
                start: float = 0.5

                def build(self, site):
                    return Idle(self.start)

            class Idle(FeedForward):
                def __init__(self, start):
                    super().__init__()
                    import torch
                    self.start, self.by = start, nn.Parameter(torch.empty(()))

                def initialise(self, name, parameter, generator):
                    parameter.fill_(self.start)

                def forward(self, x_BTD, ctx=None):
                    return x_BTD * self.by, {}
            '''
        )
    )
    info = tmp_path / "stranger-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[torchstone.parts]\nffn.idle = stranger:IdleSpec\n")
    printed = run(
        """
        import sys, torch
        from torchstone.model.site import initialise
        from torchstone.model.transformer import TransformerSpec
        from torchstone.spec import kinds, resolve, validate
        plain = validate(TransformerSpec, {"vocabulary": 9, "width": 16, "attention": {"heads": 2}, "depth": 1})
        lazy = "stranger" not in sys.modules
        data = {**plain.dump(), "ffn": {"kind": "idle", "start": 2.0}}
        data.pop("kind")
        model = initialise(validate(TransformerSpec, data).build(), 0)
        shape = tuple(model(torch.zeros(1, 3).long()).logits.shape)
        print(lazy, "idle" in kinds("ffn"), model.decoder.layers[0].ffn.by.item(), shape)
        """,
        path=tmp_path,
    )
    assert printed == "True True 2.0 (1, 3, 9)"


def test_broken_entry_point_does_not_break_the_kinds_that_work(tmp_path: Path) -> None:
    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[torchstone.parts]\nnorm.gone = no_such_module:GoneSpec\n")
    code = """
        from torchstone.errors import TorchstoneError
        from torchstone.spec import resolve, kinds
        print(resolve("norm", "rmsnorm").kind, end=" ")
        try:
            resolve("norm", "nothing")
        except TorchstoneError as error:
            print("nothing" in str(error))
        """
    assert run(code, path=tmp_path) == "rmsnorm True"
