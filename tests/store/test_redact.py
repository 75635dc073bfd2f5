import json
import time
from dataclasses import replace

import pytest

from offline_lm.errors import UserError
from offline_lm.store.redact import FLAG, Redactor, default_patterns
from offline_lm.types import Candidate, Episode, Label, Rejected, Step

HEX = "0123456789abcdef0123456789abcdef"
ABC = "AbCdEfGhIjKlMnOpQrStUvWxYz0123456789AbCdEfGh"
JWT = f"eyJhbGciOiJIUzI1NiJ9.eyJ{ABC[:20]}.{ABC}"
SECRETS = [  # kind, text, secret
    ("authorization", f"Authorization: Bearer {ABC}", ABC),
    ("authorization", "'Proxy-Authorization': 'Basic Ym9iOnB3'", "Ym9iOnB3"),
    ("authorization", 'authorization: Digest username="bob", response="6629fae4"', "6629fae4"),
    ("bearer", "curl -H bearer abc123def456", "abc123def456"),
    ("cookie", "Cookie: sid=s3cr3t; theme=dark", "s3cr3t"),
    ("cookie", '"set-cookie": "sid=s3cr3t; HttpOnly; Path=/"', "s3cr3t"),
    ("cookie", "> document.cookie\n'sid=s3cr3t'", "s3cr3t"),
    ("jwt", f"got {JWT} back", JWT),
    ("aws_key_id", "AKIAIOSFODNN7EXAMPLE", "AKIAIOSFODNN7EXAMPLE"),
    ("aws_secret", f"aws_secret_access_key = {ABC[:40]}", ABC[:40]),
    ("github", f"ghp_{ABC[:36]}", ABC[:36]),
    ("github", f"github_pat_{ABC}", ABC),
    ("gitlab", f"glpat-{ABC[:20]}", ABC[:20]),
    ("slack", "xoxb-123456789012-abcdefABCDEF", "xoxb-123456789012-abcdefABCDEF"),
    ("google", f"AIza{ABC[:35]}", ABC[:35]),
    ("openai", f"sk-{ABC}", ABC),
    ("openai", f"sk-proj-{ABC[:20]}-x_{ABC}", ABC[:20]),
    ("anthropic", f"sk-ant-api03-{ABC}", ABC),
    ("huggingface", f"hf_{ABC[:34]}", ABC[:34]),
    ("stripe", f"sk_live_{ABC[:24]}", ABC[:24]),
    ("twilio", f"SK{HEX}", HEX),
    ("twilio", f"TWILIO_AUTH: {HEX}", HEX),
    ("sendgrid", f"SG.{ABC[:22]}.{ABC[:43]}", ABC[:22]),
    ("npm", f"npm_{ABC[:36]}", ABC[:36]),
    ("pypi", f"pypi-AgEIcHlwaS5vcmc{ABC}", ABC),
    ("private_key", "-----BEGIN RSA PRIVATE KEY-----\nMIIEow\n-----END RSA PRIVATE KEY-----", "MIIEow"),
    ("private_key", "-----BEGIN OPENSSH PRIVATE KEY-----\\nb3BlbnNza", "b3BlbnNza"),
    ("url_password", "https://bob:hunter2@example.org/", "hunter2"),
    ("url_query", "https://x.org/a?b=1&access_token=abcd1234&c=2", "abcd1234"),
    ("url_query", "https://x.org/?u=https%3A%2F%2Fy.org%3Ftoken%3Dabcd1234", "abcd1234"),
    ("url_query", "/blob?sig=qwertyuiop", "qwertyuiop"),
    ("secret", "api_key = 'abc123def'", "abc123def"),
    ("secret", r"{\"clientSecret\": \"s3cr3tvalue\"}", "s3cr3tvalue"),
    ("url_query", "export GH_TOKEN=abcdefabcdefabcdef", "abcdefabcdefabcdef"),
    ("password", "password: hunter2", "hunter2"),
    ("url_query", "user=bob&password=hunter2&go=1", "hunter2"),
    ("password", '{"db_password": "hunt er2"}', "hunt er2"),
    ("password", r"{\"password\": \"hunter2\"}", "hunter2"),
    ("password_said", 'Enter the password "tAt7" into both fields', "tAt7"),
    ("password_said", "Log in as bob with password hunter2.", "hunter2"),
    ("password_field", "[12] textbox 'Password' value='hunter2', focused", "hunter2"),
    ("password_input", '<input value="hunter2" id="p" type="password">', "hunter2"),
]
READABLE = [
    "[12] textbox 'Password', required",
    "Forgot your password?",
    "enter the password",
    "Reset password 'Continue'",
    "StaticText 'Password:'\n[3] textbox ''",
    "Password: required",
    "Password must be at least 8 characters",
    '<label>Password:</label><input type="password" name="password" value="">',
    '<input type="submit" name="reset_password" value="Reset password">',
    ".password:focus { color: red }",
    "textbox 'Password' value='••••••••'",
    "max_tokens: 100000, n_tokens=512, token count 12, price per token: 0.000015",
    "AutoTokenizer.from_pretrained('x')",
    "Accept all cookies. Cookie Policy: we use cookies",
    "Apple Authorized Service; authorization required",
    "the secret garden; a secret: agent",
    "class='sk-circle-fade-dot task-list risk-averse'",
    "Bearer of news, Basic Support",
    "grep: /etc/passwd: Permission denied; pwd=/home/bob",
    "mail bob@example.org, call 555-1234",
    "https://example.org:8080/@bob?sort_key=name&page=2",
]


@pytest.fixture
def redactor():
    return Redactor.default()


def step(t=0, **fields):
    return Step(**{"step": t, "observation": f"page {t}", "action": f"click[{t}]", **fields})


def episode(*steps, **fields):
    return Episode(**{"source": "jsonl", "native_id": "1", "steps": steps or (step(),), **fields})


@pytest.mark.parametrize(("kind", "text", "secret"), SECRETS)
def test_each_kind_is_found_counted_and_left_alone_after(redactor, kind, text, secret):
    redacted = redactor.text(text)
    assert secret not in redacted
    assert f"[redacted:{kind}:1]" in redacted
    assert redactor.counts[kind] >= 1
    assert redactor.text(redacted) == redacted
    page = "a long page\n" * 500
    assert secret not in redactor.text(page + text + "\n" + page)


def test_every_default_kind_is_tested():
    assert {kind for kind, _, _ in SECRETS} == default_patterns().keys() - {"basic"}


@pytest.mark.parametrize("text", READABLE)
def test_ordinary_pages_stay_as_they_are(redactor, text):
    assert redactor.text(text) == text
    same = episode(step(observation=text), goal=text)
    assert redactor.episode(same) is same
    assert not redactor.counts


def test_clean_episode_is_the_same_object_and_no_patterns_redact_nothing(redactor):
    clean = episode(extra={"tokens": 3})
    assert redactor.episode(clean) is clean
    dirty = episode(goal="password: hunter2")
    assert Redactor({}).episode(dirty) is dirty


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ({"x": "("}, "redact.patterns.x is no regular expression"),
        ({"x": "a*"}, "redact.patterns.x can match nothing"),
        ({"a b": "a"}, "'a b' is no name"),
        ({"x": "(?#starts ab)ab"}, "too short"),
    ],
)
def test_a_bad_pattern_is_named(patterns, message):
    with pytest.raises(UserError, match=message):
        Redactor(patterns)


def test_a_pattern_without_starts_is_searched_everywhere():
    assert Redactor({"mail": r"\w+@\w+\.org"}).text("to bob@x.org, ann@x.org, bob@x.org") == (
        "to [redacted:mail:1], [redacted:mail:2], [redacted:mail:1]"
    )


PAGE = "[11] textbox 'User'\n[12] textbox 'Password', required\n[13] button 'Log in'"
HTML = '<input bid="11" name="user"><input bid="12" type="password"><button bid="13">'
CHAT = json.dumps([{"role": "user", "content": PAGE}])


@pytest.mark.parametrize(
    "fields",
    [
        {"observation": PAGE, "action": "fill('12', 'hunter2')"},
        {"observation": HTML, "action": 'fill("12", "hunter2")'},
        {"observation": PAGE, "action": "type [12] [hunter2] [1]"},
        {"observation": PAGE, "action": "Type [12]; hunter2"},
        {"observation": "[12]<input type=password/>", "action": '{"input_text": {"index": 12, "text": "hunter2"}}'},
        {"observation": PAGE, "action": 'input_text(index=12, text="hunter2")'},
        {"observation": PAGE, "action": "x", "action_name": "fill", "action_args": {"bid": "12", "value": "hunter2"}},
        {"action": 'fill(7, "hunter2")', "target": {"ref": 7, "tag": "input_password", "text": ""}},
        {"action": 'browser_type(element="Password textbox", ref="e3", text="hunter2")'},
        {"action": "page.get_by_label('Password').fill('hunter2')"},
        {"observation": '- textbox "Password" [ref=e3]', "action": 'browser_type(ref="e3", text="hunter2")'},
        {"action": "[textbox] Password -> TYPE: hunter2"},
        {"observation": PAGE, "action": 'do(action="Type", argument="hunter2", element="12")'},
        {
            "observation": None,
            "messages": json.dumps([{"role": "user", "content": PAGE}]),
            "action": "fill('12', 'hunter2')",
        },
        {
            "action": '[{"input_text": {"index": 1, "text": "bob42"}}, {"input": {"index": 2, "text": "hunter2"}}]',
            "extra": {"interacted_element": [{"tag_name": "input"}, {"attributes": {"type": "password"}}]},
        },
        {"observation": "[12] textbox 'Password' focused", "action": "keyboard_type('hunter2')"},
    ],
)
def test_a_typed_password_is_known_by_its_field_in_every_grammar(redactor, fields):
    made = episode(
        step(0, observation="hunter2 was here", thought="bob42 has hunter2"),
        step(1, **fields),
        step(2, observation="value: hunter2!", candidates=(Candidate(action="say hunter2", response="'hunter2'"),)),
        goal="Sign in as bob42 with hunter2",
        final_answer="hunter2 and hunter22",
        labels=(Label(kind="judge", reason="typed hunter2"),),
        extra={"deep": [{"x": "a hunter2"}]},
    )
    redacted = redactor.episode(made)
    left = repr(redacted).replace("hunter22", "")
    assert "hunter2" not in left
    assert "bob42" in left
    assert redacted.goal == "Sign in as bob42 with [redacted:typed_password:1]"
    assert "[redacted:typed_password:1]" in repr(redacted.steps[1])
    assert Redactor.default().episode(redacted) == redacted
    assert Redactor.default().episode(made) == redacted


def test_what_is_typed_elsewhere_stays(redactor):
    made = episode(step(observation=PAGE, action="fill('11', 'bob42')"), goal="be bob42")
    assert redactor.episode(made) is made


def test_a_short_password_goes_only_where_it_is_typed(redactor):
    made = episode(
        step(0, observation=PAGE, action="fill('12', 'cat')", response="I do fill('12', 'cat')"),
        step(1, observation="a cat; textbox 'Password' value='cat'"),
        goal="find a cat",
    )
    redacted = redactor.episode(made)
    assert redacted.goal == "find a cat"
    assert redacted.steps[0].action == "fill('12', '[redacted:typed_password:1]')"
    assert redacted.steps[0].response == "I do fill('12', '[redacted:typed_password:1]')"
    assert redacted.steps[1].observation == "a cat; textbox 'Password' value='[redacted:typed_password:1]'"


def test_every_place_is_redacted_and_json_stays_json(redactor):
    key = f"ghp_{ABC[:36]}"
    messages = json.dumps([{"role": "user", "content": f'say "{key}"', "password": "p1", "n": 1}])
    made = episode(
        step(messages=messages, url=f"https://x.org/?token={key}", title=key, response=key, thought=key, action=key,
             sub_actions=(key,), action_args={"a": [key]}, action_error=key, target={"text": key},
             observation_error=key, candidates=(Candidate(action=key),), extra={key: 1, "note": key}),
        native_id=key, task_id=key, uri=f"logs/{key}.jsonl", goal=key, final_answer=key, sampling={"note": key},
        start_url=key, labels=(Label(kind="human", labeler=key, reason=key),), dataset=key, sha256="f" * 64,
    )  # fmt: skip
    redacted = redactor.episode(made)
    assert ABC[:36] not in repr(redacted)
    assert redacted.native_id == "[redacted:github:1]#ffffffffffff"
    message = json.loads(redacted.steps[0].messages or "")[0]
    assert message == {"role": "user", "content": 'say "[redacted:github:1]"', "password": "[redacted:named:1]", "n": 1}


def test_keys_named_like_secrets_lose_their_whole_value(redactor):
    extra = {
        "password": "x", "accessToken": 12345, "headers": {"Cookie": "abc", "Accept": "text"}, "cookies": [{"v": "q"}],
        "har": [{"name": "Authorization", "value": "zzz"}, {"name": "Host", "value": "h"}], "pair": ["Set-Cookie", "q"],
        "api_key": None, "max_tokens": 5, "token": {"a": "b"}, "eos_token": "</s>",
        "logprob": [{"token": "a", "logprob": 0}],
    }  # fmt: skip
    got = redactor.episode(episode(extra=extra)).extra
    assert got["password"] == "[redacted:named:1]"
    assert got["accessToken"] == "[redacted:named:2]"
    assert got["headers"] == {"Cookie": "[redacted:named:3]", "Accept": "text"}
    assert str(got["cookies"]).startswith("[redacted:named")
    assert str(got["har"][0]["value"]).startswith("[redacted:named")
    assert got["har"][1] == {"name": "Host", "value": "h"}
    assert got["pair"][1].startswith("[redacted:named")
    assert (got["api_key"], got["max_tokens"], got["eos_token"]) == (None, 5, "</s>")
    assert got["logprob"] == [{"token": "a", "logprob": 0}]


def test_a_found_secret_is_replaced_in_other_writings_too(redactor):
    made = episode(step(observation='saw a+b/c%2"d and a%2Bb%2Fc%252%22d'), goal="password: 'a+b/c%2\"d'")
    redacted = redactor.episode(made)
    assert redacted.steps[0].observation == "saw [redacted:password:1] and [redacted:password:1]"


def test_token_ids_of_redacted_texts_are_dropped_and_that_is_said(redactor):
    ids = {"prompt_token_ids": (1, 2), "response_token_ids": (3,), "response_logprobs": (-0.5,)}
    made = episode(
        step(0, **ids),
        step(1, response="password: hunter2x", extra={"tokens": [1], "n": 1}, **ids),
        step(2, **ids),
    )
    redacted = redactor.episode(made)
    assert FLAG in redacted.quality_flags
    first, second, third = redacted.steps
    assert first == made.steps[0]
    assert (second.prompt_token_ids, second.response_token_ids, second.response_logprobs) == (None, None, None)
    assert second.extra == {"n": 1}
    assert (third.prompt_token_ids, third.response_token_ids) == (None, (3,))  # its prompt holds the step before


def test_placeholders_of_the_log_keep_their_numbers(redactor):
    made = episode(goal="[redacted:password:1] and password: hunter2")
    assert redactor.episode(made).goal == "[redacted:password:1] and password: [redacted:password:2]"


REJECTED = Rejected(source="jsonl", uri="log.jsonl", offset=0, reason="json_syntax", message="bad")


@pytest.mark.parametrize(
    "excerpt",
    [
        '{"password": "hunter2", "x": "y"',
        '{"user": "bob", "passwd":"hunter2',
        'xx token\\": \\"hunter2',
        "Cookie hunter2",
        '{"action": "fill(\'12\', \'hunter2\')", "goal"',
        "log in as bob / hunter2",
    ],
)
def test_an_excerpt_cut_anywhere_shows_no_value_after_a_mention(redactor, excerpt):
    rejected = redactor.rejected(replace(REJECTED, excerpt=excerpt, message="steps[0].password is 'hunter2; it"))
    assert "hunter2" not in rejected.excerpt
    assert "hunter2" not in rejected.message
    assert rejected.message.startswith("steps[0].password is ")


def test_a_rejected_record_without_secrets_stays(redactor):
    assert redactor.rejected(replace(REJECTED, excerpt='{"a": 1')) == replace(REJECTED, excerpt='{"a": 1')
    uri = redactor.rejected(replace(REJECTED, uri=f"s3://b/ghp_{ABC[:36]}.json")).uri
    assert uri == "s3://b/[redacted:github:1].json"


def test_lone_surrogates_private_characters_and_depth_are_no_trouble(redactor):
    assert redactor.text("\ud800 password: hunter2 \U000f0000") == "\ud800 password: [redacted:password:1] \U000f0000"
    deep: list = []
    for _ in range(5000):
        deep = [deep]
    assert (
        redactor.episode(episode(goal="password: hunter2", extra={"x": deep})).goal == "password: [redacted:password:1]"
    )


@pytest.mark.parametrize("kind", default_patterns())
def test_no_pattern_is_slow_on_text_made_against_it(kind):
    pattern = default_patterns()[kind]
    start = pattern.split("(?#starts ")[1].split(")")[0].split("|")[0]
    redactor = Redactor({kind: pattern})
    for unit in (start, f"{start}: '", f"{start}=a\\", f"<input type=password {start}", f"{start}.{start};"):
        text = (unit * (1_000_000 // len(unit)))[:1_000_000]
        before = time.process_time()
        redactor.text(text)
        assert time.process_time() - before < 10


def test_clean_pages_are_screened_fast(redactor):
    clean = episode(*(step(i, observation=("[7] link 'Café au lait', visible\n" * 450)[:14_000]) for i in range(20)))
    times = []
    for _ in range(10):
        before = time.perf_counter()
        assert redactor.episode(clean) is clean
        times.append(time.perf_counter() - before)
    assert 20 * 14_000 / min(times) / 1e6 > 40  # MB/s; some 300 on an idle core
