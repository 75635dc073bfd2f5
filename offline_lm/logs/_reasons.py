"""Why a record stands in ``quarantine``: every reason code, what it means and the mend.

The codes are stable: queries and dashboards group by them. The message beside a code says where and what exactly.
A test holds this list and the code together.
"""

from __future__ import annotations

_FILES = {
    "unreadable_file": "The file cannot be opened, or is a pipe or a device; mend its permissions or copy it.",
    "damaged_file": "The file or its compression breaks off or does not match its checksum; fetch it again.",
    "damaged_render": "A rendered page lacks what its writer always puts there; was the file cut? Fetch it again.",
    "empty_file": "The file holds no record; was it written to the end?",
    "too_large": "A record, file or member is longer than is read; shorten its pages or split it.",
    "unknown_format": "No format recognises the file or row; name one with source=, or its fields with fields=.",
    "unsupported_format": "The data set is of a format that is not read; write it as the one that the message names.",
    "unsupported_version": "The version of the format is not read; convert the log or update offline_lm.",
    "unsupported_space": "A Minari space has no form here; write the data set with a space of text or numbers.",
    "outside_file": "An HDF5 file points to another file; write the data set as one.",
}
_TEXT = {
    "utf16": "The text is UTF-16 or UTF-32; re-encode the file as UTF-8.",
    "invalid_utf8": "Some bytes are no UTF-8; re-encode the file as UTF-8.",
    "null_bytes": "Zero bytes stand where text should, as a crash or a full disk leaves them; fetch the file again.",
    "lone_surrogate": "Half of a surrogate pair is no character; write the whole one.",
    "control_character": "A raw control character stands in a string; write it as an escape.",
    "bad_escape": "A backslash begins an escape that JSON does not know; double the backslash.",
}
_JSON = {
    "json_truncated": "The JSON ends too soon; was the writer killed, or the file cut? Fetch it again.",
    "json_syntax": "The record is not JSON; write it with a JSON library.",
    "json_number": "A number is NaN, infinite or too large for a float; write null for what was not logged.",
    "python_literal": "The record is Python and not JSON; write it with json.dumps, not str.",
    "trailing_data": "A second value stands on the line; write one record a line, from one process at a time.",
    "duplicate_key": "A key stands twice in one object; keep one.",
    "too_deep": "The record is nested too deeply; flatten it.",
}
_VALUES = {
    "not_an_object": "The record is a number, text or list; write an object with named fields.",
    "wrong_type": "A field holds another type than it must; the message says which it wants.",
    "missing_key": "A required field is null or absent; log it.",
    "unknown_key": "A record whose fields are fixed has another one; remove it or put it into extra.",
    "bad_value": "A value is not one of those that the field may have; the message says which they are.",
    "bad_time": "A time is not ISO 8601; write it as 2026-11-21T09:30:00Z.",
    "out_of_range": "A number lies outside what the field can hold, or over 64 bits.",
    "length_mismatch": "Two lists that belong together differ in length; log one entry each.",
    "negative_token_id": "A token id is below 0; log the tokenizer's own ids.",
    "logprob_above_zero": "The logarithm of a probability is above 0; log logarithms, not probabilities.",
    "two_executed": "Two candidates are marked as the one that was taken; keep one.",
    "bad_node": "A page's tree holds what is no node; was the recorder interrupted?",
}
_EPISODES = {
    "no_steps": "The episode holds no action; leave it out, or give its outcome with labels=.",
    "no_actions": "The log holds prompts and no replies; log the replies.",
    "no_content": "The calls of the model were recorded without their text; turn on the capture of content.",
    "outcome_only": "The record is an outcome without steps; join it to a run with labels=.",
    "missing_observation": "A step does not say what the agent saw; log observation or messages.",
    "missing_action": "A step does not say what the agent did; log action or response.",
    "missing_steps": "The numbers of the steps leave a gap: steps were lost; fetch the log again.",
    "duplicate_step": "Two steps have one number; keep one.",
    "negative_step": "A step has a number below 0; number the steps from 0.",
    "step_order": "The numbers of the steps go back, or do not rise by one; write the steps in order.",
    "step_mismatch": "A step's file and what it holds name different steps; files of two runs were mixed.",
    "steps_after_end": "Steps follow one that ended the episode; split it in two.",
    "end_conflict": "The episode and its last step say different ends; log the same.",
    "reward_conflict": "One run has several different scores; keep the right one.",
    "two_final_observations": "The final observation is there twice; keep one.",
    "final_observation_not_last": "A final observation stands before the end; write it last.",
    "final_observation_acts": "The final observation has an action or a reward; give those to the step before.",
    "ambiguous_markup": "The text of a page or of the model repeats the log's own markup; steps cannot be told apart.",
    "too_many_spans": "The traces hold more spans than are kept in memory; split the file by trace.",
}
_TRUST = {
    "pickle_refused": "The log is a pickle, or holds what is no data; see +options.allow_pickle=true.",
    "pickle_damaged": "The pickle breaks off or makes no sense; fetch it again.",
    "path_traversal": "A zip holds a name that leads out of it; do not trust the file.",
    "duplicate_member": "A zip holds one name twice; which is meant cannot be told.",
    "zip_bomb": "A zip decompresses to far more than a log holds; do not trust the file.",
    "zip_encrypted": "A zip needs a password; pack it without one.",
    "zip_link": "A zip holds a symbolic link; pack the file itself.",
    "zip_method": "A zip is compressed by a method that cannot be bounded; pack it with deflate.",
}
_STORE = {
    "id_conflict": "An episode of this source, dataset and id is stored with other content; rename the dataset.",
    "no_action": "As missing_action: the store's own check.",
    "no_observation": "As missing_observation: the store's own check.",
    "final_observation": "As final_observation_acts or _not_last: the store's own check.",
    "step_after_end": "As steps_after_end: the store's own check.",
    "non_finite": "As json_number, for a number that never was JSON: the store's own check.",
    "int_range": "As out_of_range: the store's own check.",
    "bad_type": "As wrong_type: the store's own check.",
}

REASONS: dict[str, str] = {**_FILES, **_TEXT, **_JSON, **_VALUES, **_EPISODES, **_TRUST, **_STORE}
"""What each code means, and the mend, in one sentence."""
