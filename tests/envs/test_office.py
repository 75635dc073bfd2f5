"""The office's rules and pages, read back from their text."""

import functools
import json
import re
from dataclasses import replace

import numpy as np
import orjson
import pytest

from offline_lm import ingest
from offline_lm.envs import office, shop
from offline_lm.envs.office import WRONG_SEATS, Site, Task, record

GAMMA = 0.95
SAMPLE = [(site, n) for site in range(6) for n in range(4)]


@functools.cache
def task(n=0, site=0):
    return Task(Site.draw(site), n)


def read_goal(t):
    """(day, equipment, lowest and highest number of seats) by regular expressions."""
    goal = t.mdp.goal
    (day,) = [d for d in t.days if d in goal]
    (equipment,) = [e for e in t.equipment if e in goal]
    (number,) = map(int, re.findall(r"\d+", goal))
    least = re.search(r"at least|or more|no fewer", goal)
    most = re.search(r"at most|or fewer|no more than", goal)
    assert (least is None) != (most is None)
    return day, equipment, number if least else 0, number if most else 10**6


def read_row(t, text):
    """(seats, equipment) of what a page says about a room."""
    wording = re.escape(t.site.wording["seats"]).replace(re.escape("{n}"), r"(\d+)")
    (match,) = re.findall(wording + r" \| ([a-z ]+)", text)
    return int(match[0]), match[1].strip()


def worth(t, day, text):
    wanted_day, wanted_equipment, least, most = read_goal(t)
    seats, equipment = read_row(t, text)
    if (day, equipment) != (wanted_day, wanted_equipment):
        return 0.0
    return 1.0 if least <= seats <= most else WRONG_SEATS


# -- text and truth --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("site", "n"), SAMPLE)
def test_goal_and_page_tell_what_a_reservation_earns(site, n):
    """The rewards follow from the two texts alone."""
    t = task(n, site)
    ends = 0
    for s, page in enumerate(t.mdp.pages):
        for a, action in enumerate(t.mdp.actions[s]):
            if t.mdp.next[s, a] != -1:
                assert t.mdp.reward[s, a] == 0
                continue
            ends += 1
            number = action.split("'")[1]
            (name,) = re.findall(rf"\[{number}\] button '(.*)'", page)
            assert name == t.site.wording["at_once" if t.mdp.states[s][0] == "room" else "confirm"]
            heading = page.split("heading '")[1].split("'")[0]
            searched = page.split("You searched: ")[1].split(",")[0]
            day = searched if t.mdp.states[s][0] == "room" else heading.split(", ")[1]
            assert t.mdp.reward[s, a] == worth(t, day, page)
    assert ends > 40


@pytest.mark.parametrize(("site", "n"), SAMPLE)
def test_no_two_states_look_alike_and_none_shows_the_goal(site, n):
    t = task(n, site)
    assert 60 <= len(t.mdp.states) <= 200
    assert len(set(t.mdp.pages)) == len(t.mdp.states)
    assert t.mdp.goal not in "\n".join(t.mdp.pages)
    (number,) = re.findall(r"\d+", t.mdp.goal)
    assert not any(re.search(rf"(at least|at most|than) {number}", page) for page in t.mdp.pages)


@pytest.mark.parametrize(("site", "n"), SAMPLE)
def test_actions_name_elements_of_their_page(site, n):
    roles = {"click": "link|button", "select_option": "combobox", "fill": "textbox"}
    t = task(n, site)
    for state, page, actions in zip(t.mdp.states, t.mdp.pages, t.mdp.actions, strict=True):
        numbers = [int(i) for i in re.findall(r"\[(\d+)\]", page)]
        assert numbers == sorted(set(numbers))
        assert len(set(actions)) == len(actions)
        assert ("go_back()" in actions) == (state != ("home",))
        for action in actions:
            if action != "go_back()":
                ((name, number, text),) = re.findall(r"^(\w+)\('(\d+)'(?:, '(.+)')?\)$", action)
                assert re.search(rf"\[{number}\] ({roles[name]}) ", page)
                assert text in page
        clickable = re.findall(r"\[(\d+)\] (?:link|button) .*, clickable", page)
        assert [f"click('{i}')" for i in clickable] == [a for a in actions if a.startswith("click")]


@pytest.mark.parametrize(("site", "n"), SAMPLE)
def test_the_list_holds_near_misses(site, n):
    """On the page that the goal's search gives: a room that fits, free; one with too few or many seats, free; and one
    that misses nothing but the equipment."""
    t = task(n, site)
    day, equipment, least, most = read_goal(t)
    page = t.mdp.pages[t.mdp.states.index(("list", day, equipment))]
    rows = [(*read_row(t, row), t.site.wording["free"] in row) for row in re.findall(r"row '(.*)'", page)]
    assert len(rows) == 4
    fits = [least <= seats <= most for seats, _, _ in rows]
    assert any(fit and e == equipment and free for fit, (_, e, free) in zip(fits, rows, strict=True))
    assert any(not fit and e == equipment and free for fit, (_, e, free) in zip(fits, rows, strict=True))
    assert [fit for fit, (_, e, _) in zip(fits, rows, strict=True) if e != equipment] == [True]


# -- values ----------------------------------------------------------------------------------------------------


def searched(mdp, start):
    """V* by breadth-first search: the best of reward * gamma ** (steps before it) over all ends."""
    best, distance, queue = 0.0, {start: 0}, [start]
    for s in queue:
        for a in range(len(mdp.actions[s])):
            after = int(mdp.next[s, a])
            if after == -1:
                best = max(best, GAMMA ** distance[s] * mdp.reward[s, a])
            elif after not in distance:
                distance[after] = distance[s] + 1
                queue.append(after)
    return best


@pytest.mark.parametrize(("site", "n"), SAMPLE[::5])
def test_values_by_searching_every_way(site, n):
    mdp = task(n, site).mdp
    v, _ = mdp.optimal(GAMMA)
    np.testing.assert_allclose(v, [searched(mdp, s) for s in range(len(v))], atol=1e-12)


def test_values_by_walking():
    """From a few states, the greedy policy collects V*, click by click."""
    mdp = task(2).mdp
    v, q = mdp.optimal(GAMMA)
    policy = mdp.greedy(q).argmax(axis=1)
    for start in range(0, len(v), 7):
        s, total, discount = start, 0.0, 1.0
        for _ in range(50):
            if s < 0:
                break
            total += discount * mdp.reward[s, policy[s]]
            discount *= GAMMA
            s = int(mdp.next[s, policy[s]])
        assert total == pytest.approx(v[start], abs=1e-12)


@pytest.mark.parametrize(("site", "n"), SAMPLE)
def test_the_goal_is_reached_in_six_steps_and_the_careless_fail(site, n):
    """Find, day, equipment, search, room, reserve."""
    mdp = task(n, site).mdp
    v, q = mdp.optimal(GAMMA)
    assert v[0] == pytest.approx(GAMMA**5)
    assert mdp.play(mdp.greedy(q), 6) == 1.0
    assert mdp.play(mdp.greedy(q), 5) == 0.0
    assert v[mdp.states.index(("staff",))] == 0.0
    successes = replace(mdp, reward=1.0 * (mdp.reward == 1.0))
    chances = {name: successes.play(policy) for name, policy in mdp.behaviours().items()}
    assert chances["skilled-0.1"] > 0.9
    assert 0.3 < chances["skilled-0.4"] < 0.8
    assert chances["careless-0.3"] < 0.05
    assert chances["random"] < 0.05
    mistaken = replace(mdp, reward=mdp.mistaken)
    assert mistaken.play(mdp.behaviours()["careless-0.3"]) > 0.5  # it knows the way, to another goal


# -- words and logs --------------------------------------------------------------------------------------------


def test_it_shares_no_wording_with_the_shop():
    def words(site):
        phrases = [p for calls in site._WORDING.values() for p in calls] + list(site._FILLER) + list(site._GOALS)
        return {phrase.lower() for phrase in phrases}

    assert not words(office) & words(shop)
    nouns = {w.lower() for w in (*office._NAMES, *office._EQUIPMENT, *office._DAYS)}
    assert not nouns & set((*shop._NOUNS, *shop._COLOURS, *shop._MATERIALS, *shop._SIZES))


def test_goals_vary_in_wording_and_direction():
    goals = [task(n).mdp.goal for n in range(40)]
    patterns = [re.sub(r"\d+", "{n}", goal) for goal in goals]
    for phrase in (*office._AT_LEAST, *office._AT_MOST):
        assert any(phrase in pattern for pattern in patterns), phrase
    assert len(set(goals)) == 40


def test_ingest_takes_every_record(tmp_path, capsys):
    log = tmp_path / "office.jsonl"
    log.write_bytes(b"\n".join(map(orjson.dumps, record([task(n) for n in range(4)], 8))) + b"\n")
    arguments = ["source=jsonl", f"path={log}", f"store={tmp_path / 'store'}", "mode=strict", "json=true"]
    assert ingest.main(arguments) == 0
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert (result["read"], result["accepted"], result["duplicates"], result["quarantined"]) == (32, 32, 0, 0)
