"""Partners of equal cost, and the papers' configs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from peer_dist.config import ConfigError, load_config
from peer_dist.kinds.cost import merged, total
from peer_dist.planning.counts import Counts, count
from peer_dist.sweep.match import Partner, match, misses, overruled
from tests.models import ROUTERS, make
from tests.ranks import run_command

VOCAB = 128
MIDDLE = {"model.mlp": ["dense", "peer", "dense"]}
PAPER = {
    "model.hidden_size": 1024, "model.ffn_hidden_size": 4096, "peer.num_experts": 1024**2, "peer.heads": 8,
    "peer.top_k": 16, "peer.key_dim": 128, **MIDDLE,
}  # fmt: skip


def feed_forward(counts: Counts, mode: str) -> int:
    every = total(merged(layer.feed_forward for layer in counts.layers))
    return every.flops if mode == "flops" else every.parameters


def test_product_key_memory_picks_twice_as_many_values_for_equal_flops() -> None:
    """The PEER paper's pair: 8 x 16 experts, 8 x 32 values, the same million of keys."""
    config = make(PAPER)
    own, pkm = match(config, VOCAB, ["pkm"], "flops")
    assert pkm.sizes == {"num_values": 1024**2, "heads": 8, "top_k": 32, "key_dim": 128}
    assert pkm.counts.total.flops == own.counts.total.flops
    assert pkm.deviation == 0
    back = match(pkm.config, VOCAB, ["peer"], "flops")[1]
    assert back.sizes == own.sizes


def test_product_key_memory_has_twice_as_many_rows_for_equal_parameters() -> None:
    pkm = match(make(PAPER), VOCAB, ["pkm"], "params")[1]
    assert pkm.sizes["num_values"] == pytest.approx(2 * 1024**2, rel=0.01)


@pytest.mark.parametrize("mode", ["flops", "params"])
@pytest.mark.parametrize("changes", [PAPER, {"model.mlp": "pkm"}, {"model.mlp": "peer", **ROUTERS[0]}], ids=str)
def test_partners_have_the_nearest_sizes(mode: str, changes: dict[str, Any]) -> None:
    """No neighbour of the finest free size is nearer, and the deviation is that of the layers compared."""
    own, *partners = match(make(changes), VOCAB, ["dense", "moe", "sigma_moe"], mode, tolerance=0)
    compared = total(own.parts).flops if mode == "flops" else total(own.parts).parameters
    target = feed_forward(own.counts, mode)
    for partner in partners:
        got = feed_forward(count(partner.config, VOCAB), mode)
        assert own.kind not in partner.config.model.mlp_kinds
        assert partner.deviation == (got - target) / compared
        section, name = (
            ("model", "ffn_hidden_size") if partner.kind == "dense" else (partner.kind, "expert_hidden_size")
        )
        for step in (-1, 1) if partner.sizes[name] > 1 else (1,):
            neighbour = make({f"{section}.{name}": partner.sizes[name] + step}, partner.config.model_dump())
            assert abs(feed_forward(count(neighbour, VOCAB), mode) - target) >= abs(got - target)


def test_dense_partners_share_the_width_over_all_dense_layers() -> None:
    own, dense = match(make({**MIDDLE, "parallel.tensor": 2}), VOCAB, ["dense"], "params")
    assert dense.config.model.mlp_kinds == ["dense"] * 3
    assert dense.config.model.ffn_hidden_size % 2 == 0
    assert feed_forward(dense.counts, "params") == pytest.approx(feed_forward(own.counts, "params"), rel=0.02)


def test_equal_budgets_keep_sizes_and_stretch_the_run() -> None:
    steps = {"train.steps": 1000, "optimizer.warmup_steps": 50, "optimizer.decay_steps": 1000}
    own, *partners = match(make({**PAPER, **steps}), VOCAB)
    assert [partner.kind for partner in partners] == ["dense", "moe", "pkm", "sigma_moe"]
    budget = own.tokens * own.counts.train_flops_per_token
    for partner in partners:
        config = partner.config
        assert partner.tokens == config.train.steps * config.train.global_batch_size * 16
        assert partner.tokens * partner.counts.train_flops_per_token == pytest.approx(budget * (1 + partner.deviation))
        assert abs(partner.deviation) <= 0.5 / config.train.steps + 1e-9
        assert config.optimizer.decay_steps == pytest.approx(config.train.steps, abs=1)
        assert config.optimizer.warmup_steps == pytest.approx(config.train.steps / 20, abs=1)
        assert (config.moe, config.pkm, config.sigma_moe) == (own.config.moe, own.config.pkm, own.config.sigma_moe)


def test_what_cannot_be_matched_is_said() -> None:
    few = make({**MIDDLE, "peer.top_k": 6})  # would take 12 of each head's 8 sub-keys
    partners = match(few, VOCAB, ["pkm", "moe"], "flops")
    given, found = (run.config.moe.expert_hidden_size for run in (partners[0], partners[2]))
    assert overruled(partners, [f"moe.expert_hidden_size={given}", "peer.top_k=6"]) == [
        f"moe.expert_hidden_size: was given as {given}, and is {found} in the moe partner, to be equal"
    ]
    (sentence,) = misses(partners, 0.1)
    assert sentence.startswith("pkm: the nearest sizes found (num_values 64, heads 2, top_k 8, key_dim 8) differ by -")
    assert not misses(partners, 0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "tokens"}, "--mode: 'tokens' is not known; budget, flops, params"),
        ({"kinds": ["rnn"], "reference_kind": "moe"}, "--kind: 'rnn' is not known; dense, peer, moe, pkm, sigma_moe"),
        ({"kinds": ["moe"], "reference_kind": "moe"}, "--kind: moe is the kind of the layers to replace"),
        ({"reference_kind": "pkm"}, "--reference-kind: model.mlp has no pkm layer"),
        ({}, "model.mlp: has moe and peer layers; say with --reference-kind which to replace"),
    ],
)
def test_mistakes_are_answered(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        match(make({"model.mlp": ["moe", "peer", "dense"]}), VOCAB, **arguments)
    assert str(raised.value).startswith(message)


def test_the_command_writes_runs_of_their_own(text: Path, small: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(small))
    command = ["match", "--config", "run.yaml", "--kind", "dense", "--kind", "moe", "--write", "partners"]
    result = run_command(*command, "train.steps=12", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert all(word in result.stdout for word in ("peer", "dense", "moe", "query", "deviation"))
    config = load_config(tmp_path / "run.yaml", ["train.steps=12"])
    padded = 384  # bytes and the end of a document
    expected: list[Partner] = match(config, padded, ["dense", "moe"])
    for partner in expected[1:]:
        written = load_config(tmp_path / "partners" / f"run-{partner.kind}.yaml")
        assert written == partner.config
        assert written.model.mlp_kinds == [partner.kind, "dense", partner.kind]
        assert written.checkpoint.dir == str(tmp_path / partner.kind / "checkpoints")
        assert written.logging.dir == str(tmp_path / partner.kind / "logs")


PAPERS = Path(__file__).parent.parent / "configs" / "paper"


@pytest.mark.parametrize("path", sorted(PAPERS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_papers_configs_are_runs_of_equal_cost(path: Path) -> None:
    """Each loads, writes where no other does, and a partner costs what the config that it is named after does."""
    config = load_config(path)
    assert config.checkpoint.dir not in {load_config(other).checkpoint.dir for other in PAPERS.glob("*.yaml")} - {
        config.checkpoint.dir
    }
    if path.read_text().startswith("# The "):  # written by match
        of = load_config(
            max((p for p in PAPERS.glob("*.yaml") if path.stem.startswith(f"{p.stem}-")), key=lambda p: len(p.stem))
        )
        budget = [each.train.steps * count(each, 32000).train_flops_per_token for each in (config, of)]
        parameters = [count(each, 32000).total.parameters for each in (config, of)]
        assert budget[0] == pytest.approx(budget[1], rel=0.02) or parameters[0] == pytest.approx(
            parameters[1], rel=0.02
        )
