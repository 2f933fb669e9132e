"""Addresses in texts: users, passwords and tokens in them are not for messages, logs and files."""

import re

HUB_ADDRESS = re.compile(
    r"hf://(?:(?P<kind>models|datasets|spaces)/)?(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/?#:@]+))?"
    r"/(?P<file>[^?#]+)",
    re.IGNORECASE,
)


def hide_secrets(address: str) -> str:
    """Make an address fit for messages: without user, password, query and fragment.

    Where it is unclear what is a password, as in an address that is not valid, only the scheme is left.
    """
    kind, _, rest = address.partition("://")
    hidden = f"{kind}://..."
    if not address.isprintable():
        return hidden
    authority = re.split("[/?#]", rest, maxsplit=1)[0]
    after = rest[len(authority) :]
    path = re.split("[?#]", after, maxsplit=1)[0]
    if kind.lower() == "hf":
        shown = f"{kind}://{authority}{path}"
        return shown if HUB_ADDRESS.fullmatch(shown) or not re.search("[:@]", rest) else hidden
    host = authority.rpartition("@")[2]
    if not re.fullmatch(r"([^][:\s]*|\[[0-9A-Fa-f:.]*\])(:[0-9]*)?", host):
        return hidden
    if ":" in host and host[0] != "[" and "@" in after:  # host and port, or user and half a password
        return hidden
    return f"{kind}://{host}{path}"


_WITH_USER = re.compile(
    r"""(?<!\w)(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*:/|/)/?(?P<rest>(?<=//|:/)(?:[^\s"'<>@]{0,4096}@)+[^\s"'<>]*)"""
)
"""An address with an @ in it; the scheme may be left out, and pathlib takes one of two slashes away. The
length of the parts is bounded, because texts may be long."""


def hide_passwords(text: str) -> str:
    """Return a text with the users and passwords of all addresses in it left out.

    An @ elsewhere in an address, as before a revision, is no password and stays.
    """

    def hide(found: re.Match[str]) -> str:
        rest = found["rest"].rstrip(":;,.)]")
        begin = found[0][: -len(found["rest"])]
        kind = begin.rstrip(":/") or "any"
        shown = hide_secrets(f"{kind}://{rest}").removeprefix(f"{kind}://")
        return begin + shown + found["rest"][len(rest) :]

    return _WITH_USER.sub(hide, text) if "@" in text else text


def hide_passwords_in(value: object) -> object:
    """Return a value of tables, lists and texts with `hide_passwords` applied to each text in it."""
    if isinstance(value, str):
        return hide_passwords(value)
    if isinstance(value, dict):
        return {key: hide_passwords_in(item) for key, item in value.items()}
    return [hide_passwords_in(item) for item in value] if isinstance(value, list) else value
