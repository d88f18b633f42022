"""What a server's log must not say. Pure."""

SECRETS = ("admin_api_key", "api_key", "ssl_keyfile_password")  # fields of SGLang's ServerArgs


def without_secrets(arguments: dict, *_, **__) -> dict:
    """After `_server_args_for_logging`: the arguments as they are logged, secrets that are set only said to be."""
    return {name: "(set)" if name in SECRETS and value else value for name, value in arguments.items()}
