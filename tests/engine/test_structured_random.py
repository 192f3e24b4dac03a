"""A model that draws at random, and schemas that are drawn: every text is valid.

OCTAVO_TEST_EXPLORE asks for ten thousand answers to two hundred schemas, others in every run.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
from schema_helpers import random_schema
from text_helpers import tiny_model

from octavo.llm import LLM
from octavo.sampling_params import SamplingParams
from octavo.structured_outputs import StructuredOutputs

jsonschema = pytest.importorskip("jsonschema", reason="needs jsonschema: pip install jsonschema")
pytest.importorskip("llguidance", reason="needs llguidance: pip install llguidance")

EXPLORE = bool(os.environ.get("OCTAVO_TEST_EXPLORE"))
NUM_SCHEMAS, NUM_ANSWERS = (200, 50) if EXPLORE else (24, 3)
WHITESPACE = [{"disable_any_whitespace": True}, {"whitespace_pattern": "[ \n]"}, {}]
# Most of what this model writes would be whitespace: a schema whose texts may be long has little.


def test_every_text_parses_and_validates(tmp_path: Path) -> None:
    llm = LLM(
        tiny_model(tmp_path, context=4096),
        load_format="dummy",
        num_threads=1,
        max_num_seqs=64,
        num_kv_blocks=4096,
    )
    seed = random.randrange(2**32) if EXPLORE else 3
    print(f"seed {seed}")
    rng = random.Random(seed)
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    num_characters = 0
    for number in range(NUM_SCHEMAS):
        schema = random_schema(rng)
        jsonschema.Draft202012Validator.check_schema(schema)
        validator = jsonschema.Draft202012Validator(schema, format_checker=checker)
        options = WHITESPACE[: 2 if len(str(schema)) > 400 or "$defs" in schema else 3]
        wanted = StructuredOutputs(json=schema, **rng.choice(options))
        params = [
            SamplingParams(
                temperature=rng.choice([0.7, 1.0, 5.0, 100.0]),
                structured_outputs=wanted,
                seed=rng.randrange(2**32),
                max_tokens=4000,
            )
            for _ in range(NUM_ANSWERS)
        ]
        outputs = llm.generate(["a"] * NUM_ANSWERS, params, progress=False)
        for output in outputs:
            num_characters += len(output.text)
            finish_reason = output.outputs[0].finish_reason
            assert finish_reason == "stop", (number, finish_reason, schema, output.text)
            try:
                validator.validate(json.loads(output.text))
            except Exception as error:
                raise AssertionError(f"schema {number}: {schema}: {output.text!r}") from error
    print(f"{NUM_SCHEMAS * NUM_ANSWERS} texts, {num_characters} characters")
