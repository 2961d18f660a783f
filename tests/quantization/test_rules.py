import pytest

from qalora_export.errors import InputError
from qalora_export.grid import GRIDS
from qalora_export.quantization.rules import Plan, parse_rule, resolve
from qalora_export.recipe import QuantizeRule, QuantizeSettings

WIDTHS = {
    "model.layers.0.self_attn.q_proj": 128,
    "model.layers.0.mlp.down_proj": 256,
    "model.layers.1.self_attn.q_proj": 128,
    "model.layers.1.mlp.down_proj": 256,
    "lm_head": 128,
}


def plans(*rules: str, tied: bool = False, widths: dict[str, int] = WIDTHS, **values: object) -> dict[str, Plan]:
    settings = QuantizeSettings(rules=tuple(parse_rule(rule) for rule in rules), **values)
    return resolve(settings, widths, inside="model.layers.", tied=tied).plans


def test_without_rules_every_linear_layer_inside_the_decoder() -> None:
    assert plans(bits=3, group_size=64) == {name: Plan(3, 64, False) for name in WIDTHS if name != "lm_head"}


def test_the_first_matching_rule_wins() -> None:
    found = plans("*.0.*.down_proj=bits:8,group:128,sym:true", "*.down_proj=skip")
    assert found["model.layers.0.mlp.down_proj"] == Plan(8, 128, True)
    assert "model.layers.1.mlp.down_proj" not in found
    assert found["model.layers.1.self_attn.q_proj"] == Plan(4, 32, False)


@pytest.mark.parametrize("pattern", ["*", "lm*", "*head"])
def test_a_wildcard_never_reaches_lm_head(pattern: str) -> None:
    assert "lm_head" not in plans(f"{pattern}=bits:8")


def test_lm_head_by_its_name() -> None:
    assert plans("lm_head=bits:8,sym:true")["lm_head"] == Plan(8, 32, True)
    with pytest.raises(InputError, match=r"shares its weights with the embedding.*lm_head"):
        plans("lm_head=bits:8", tied=True)
    assert "lm_head" not in plans("lm_head=skip", tied=True)


def test_a_rule_that_matches_nothing_is_refused() -> None:
    with pytest.raises(InputError, match=r"'\*\.donw_proj' matches no linear layer.*named like"):
        plans("*.donw_proj=skip")


def test_skipping_everything_is_refused() -> None:
    with pytest.raises(InputError, match="skip every module"):
        plans("*=skip")


@pytest.mark.parametrize(
    ("width", "message"),
    [
        (96, r"96 in-features .* groups of 128.*down.*group size 32;.*--rule 'model\.layers\.0\.down=group:32'"),
        (192, r"192 in-features .*group size 32 or 64;.*'model\.layers\.0\.down=group:64'"),
        (48, r"48 in-features .*keep this module as it is: --rule 'model\.layers\.0\.down=skip'"),
    ],
)
def test_strict_groups_name_the_module_and_the_way_out(width: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        plans(group_size=128, strict_groups=True, widths={"model.layers.0.down": width})


@pytest.mark.parametrize(
    ("width", "asked", "group"), [(576, 128, 64), (576, 64, 64), (96, 128, 32), (96, 64, 32), (1536, 128, 128)]
)
def test_a_module_falls_to_the_next_smaller_group_that_divides(width: int, asked: int, group: int) -> None:
    assert plans(group_size=asked, widths={"model.layers.0.q": width})["model.layers.0.q"].group_size == group


def test_a_module_that_no_group_divides_stays_in_16_bits_and_the_notes_list_it() -> None:
    names = {
        f"model.layers.{n}.{kind}": width for n in (0, 1) for kind, width in (("q", 576), ("o", 48), ("down", 1536))
    }
    found = resolve(QuantizeSettings(group_size=128), names, inside="model.layers.", tied=False)
    assert {name.rpartition(".")[2]: plan.group_size for name, plan in found.plans.items()} == {"q": 64, "down": 128}
    assert found.notes() == (
        "2 × q: groups of 64, 576 in-features do not divide into groups of 128",
        "2 × o: left in 16 bits, 48 in-features do not divide into groups of 128",
    )
    with pytest.raises(InputError, match="nothing is left to quantize"):
        plans(widths={"model.layers.0.o": 48})


def test_a_rule_for_a_module_falls_too() -> None:
    found = plans("*.q_proj=group:128,bits:3", widths={"model.layers.0.q_proj": 192})
    assert found == {"model.layers.0.q_proj": Plan(3, 64, False)}


def test_the_command_line_spelling() -> None:
    assert parse_rule("a.*=skip") == QuantizeRule(match="a.*", skip=True)
    assert parse_rule("a=bits:3,group:64") == QuantizeRule(match="a", bits=3, group_size=64)
    assert parse_rule("a=group_size:128,sym:false") == QuantizeRule(match="a", group_size=128, sym=False)


@pytest.mark.parametrize(
    "text", ["a", "=skip", "a=", "a=skp", "a=bits:x", "a=bits:7", "a=group:48", "a=sym:1", "a=skip:1"]
)
def test_rules_that_cannot_be_read(text: str) -> None:
    with pytest.raises(InputError):
        parse_rule(text)


def test_a_grid_of_super_blocks_and_what_falls_back_from_it() -> None:
    """128 in-features do not divide into super-blocks, 256 do."""
    on, off = Plan(4, 32, False, GRIDS["q4_k"]), Plan(4, 32, False)
    found = plans(grid="q4_k")
    assert {name.rpartition(".")[2]: plan for name, plan in found.items()} == {"q_proj": off, "down_proj": on}
    note = "2 × q_proj: grid affine16 instead of q4_k, 128 in-features do not divide into super-blocks of 256"
    assert resolve(QuantizeSettings(grid="q4_k"), WIDTHS, inside="model.layers.", tied=False).notes() == (note,)
    with pytest.raises(InputError, match=r"128 in-features do not divide into super-blocks.*grid:affine16"):
        plans(grid="q4_k", strict_groups=True)
    by_rule = plans("*.0.*.down_proj=grid:q4_k", "*.1.*.down_proj=grid:affine16")
    assert (by_rule["model.layers.0.mlp.down_proj"], by_rule["model.layers.1.mlp.down_proj"]) == (on, off)


def test_a_grid_brings_its_own_bits_and_groups() -> None:
    found = plans("*.1.*.down_proj=grid:q4_k", grid="q2_k")
    assert found["model.layers.0.mlp.down_proj"] == Plan(2, 16, False, GRIDS["q2_k"])
    assert found["model.layers.1.mlp.down_proj"] == Plan(4, 32, False, GRIDS["q4_k"])
    assert found["model.layers.0.self_attn.q_proj"] == Plan(2, 32, False)  # groups of 16 are for super-blocks only
    assert plans(grid="q2_k", bits=2) == plans(grid="q2_k")


def test_a_rule_with_other_bits_leaves_the_grid_of_the_settings() -> None:
    found = plans("*.0.*.down_proj=bits:8,sym:true", "*.1.*.down_proj=group:32", grid="q4_k")
    assert found["model.layers.0.mlp.down_proj"] == Plan(8, 32, True)
    assert found["model.layers.1.mlp.down_proj"] == Plan(4, 32, False, GRIDS["q4_k"])


@pytest.mark.parametrize(
    ("rules", "values", "where"),
    [
        ((), {"bits": 3}, r"quantize\.grid.*3 bits in groups of 32"),
        ((), {"sym": True}, r"quantize\.grid.*symmetric"),
        (("*down_proj=grid:q4_k,bits:8",), {"grid": "affine16"}, r"quantize\.rules: \*down_proj.*8 bits"),
        (("*down_proj=grid:q4_k",), {"grid": "affine16", "group_size": 64}, r"rules: \*down_proj.*groups of 64"),
    ],
)
def test_bits_that_a_named_grid_does_not_have_are_refused(
    rules: tuple[str, ...], values: dict[str, object], where: str
) -> None:
    with pytest.raises(InputError, match=f"grid q4_k has 4 bits in groups of 32.*{where}"):
        plans(*rules, **({"grid": "q4_k"} | values))
    with pytest.raises(InputError, match="cannot read the rule"):
        parse_rule("*=grid:q9")
