"""The log of a start names no key; `serving/test_access.py` reads a server's."""

from sglang_step35.http.secrets import without_secrets


def test_keys_are_not_logged():
    arguments = {"api_key": "key-1", "admin_api_key": None, "ssl_keyfile_password": "key-2", "port": 30000}
    assert without_secrets(arguments, object()) == {
        "api_key": "(set)",
        "admin_api_key": None,
        "ssl_keyfile_password": "(set)",
        "port": 30000,
    }
