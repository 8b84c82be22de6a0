"""The SDK tests of tests/e2e over the fake engine: same tests, no model, no subprocess."""

from __future__ import annotations

from tests.e2e import test_openai_sdk as sdk

client = sdk.client
model = sdk.model
globals().update({name: value for name, value in vars(sdk).items() if name.startswith("test_")})
