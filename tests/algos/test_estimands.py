"""What each critic says that its values converge to, from the settings that a run records."""

from typing import get_args

import pytest
import yaml

from offline_lm import cli
from offline_lm.ope.alarms import ON_POLICY
from offline_lm.paths import CONF
from offline_lm.types import Estimand

OF = {
    "critic_mc": "returns", "q_mc": "returns", "critic_td": "behaviour", "sarsa": "behaviour", "digi_q": "behaviour",
    "iql_lm": "expectile", "weighted_iql": "expectile", "q_learning": "optimum",
}  # fmt: skip


def made(name, /, **settings):
    return cli.instantiate(yaml.safe_load((CONF / "algo" / f"{name}.yaml").read_text()) | settings)


def conf_of_critics():
    """Names of the files that name no critic of their own, as actors do."""
    files = {file.stem: yaml.safe_load(file.read_text()) for file in (CONF / "algo").glob("*.yaml")}
    return [name for name, settings in files.items() if "defaults" not in settings]


@pytest.mark.parametrize(("name", "estimand"), OF.items())
def test_a_critic_says_what_it_estimates(name, estimand):
    assert made(name).estimand == estimand


def test_some_say_so_by_their_settings():
    assert made("cql_lm", base="iql").estimand == "expectile"
    assert made("cql_lm", base="q_learning").estimand == "optimum"
    assert made("d3rlpy", name="IQL").estimand == "expectile"
    assert made("d3rlpy", name="AWAC").estimand == "optimum"


def test_every_critic_in_conf_is_known_and_an_expectile_has_its_tau():
    critics = {name: made(name) for name in conf_of_critics()}
    critics = {name: algo for name, algo in critics.items() if "trains_q" in dir(algo)}
    assert set(critics) >= {*OF, "cql_lm", "d3rlpy"}
    for name, algo in critics.items():
        assert algo.estimand in get_args(Estimand), name
        assert algo.estimand != "expectile" or 0 < algo.tau < 1, name
    assert {algo.estimand for algo in critics.values()} >= ON_POLICY
