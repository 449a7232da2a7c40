"""What may leave this machine: texts and JSON values without secrets, and without the folders of this machine."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from allocators.core import words
from search.config import portable_words

_SECRET_KEY = re.compile(
    r"(^|[._-])(password|passwd|pwd|secret|token|api_?key|access_?key|secret_?key|credentials?|signature|sig)$",
    re.IGNORECASE,
)
_WORDS = r"key|secret|token|passw(?:or)?d|pwd|signature|credential"
_NAMES = (
    r"password|passwd|pwd|secret|(?:api|access|account|secret|private)[_-]?key|"
    r"(?:auth|access|private|refresh|hub|hf|api|bearer)[_-]?token|credentials?"
)
_VALUE = r"""(?P<value>'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|[^\s'",;}&]+)"""  # with its quotes, where it has some
# In a text: what is kept of it, and what the secret looks like.
_SECRETS = (
    # user:password@ and token@ of any scheme, git+https:// too, and of a URI that was taken for a path (s3:/…); a
    # password may have an @ in it, and a slash where it is no port that the slash follows
    re.compile(r"(:/{1,2})[^/\s?#'\":@]*:(?!\d{1,5}/)[^\s?#'\"]{1,300}(?=@)"),
    re.compile(r"(:/{1,2})[^/\s?#'\"]*(?=@)"),
    re.compile(rf"([?&;#](?:[^=&;#\s]*(?:{_WORDS})[^=&;#\s]*|sig|auth)=)[^&;#\s'\"]+", re.IGNORECASE),
    # an environment, as a shell, Python or a log writes it
    re.compile(
        r"(\b(?:[A-Z0-9]+_)*(?:[A-Z0-9]*KEY|SECRET|TOKEN|PASSWORD|PASSWD|PASS|PAT|AUTH|CREDENTIALS?)(?:_[A-Z0-9]+)*"
        rf"['\"]?\s*[=:]\s*){_VALUE}"
    ),
    # a setting, as JSON, YAML, a command line or a driver of a database writes it
    re.compile(
        rf"((?<![\w/-])-{{0,2}}(?:[\w-]*[_-])?(?:{_NAMES})['\"]?\s*[=:]\s*){_VALUE}",
        re.IGNORECASE,
    ),
    # the same behind a slash, where a quote ends a path, and what follows its colon is no value
    re.compile(rf"((?<=/)(?:[\w-]*[_-])?(?:{_NAMES})=){_VALUE}", re.IGNORECASE),
    re.compile(rf"((?<![\w.-])token=|--(?:token|password)\s+){_VALUE}"),
    re.compile(r"(authorization['\"]?\s*[=:]\s*['\"]?(?:bearer|basic|token)\s+)[^\s'\",}]+", re.IGNORECASE),
    re.compile(r"(\b(?:hf_|gh[pousr]_|github_pat_|glpat-|xox[abp]-|sk-))[A-Za-z0-9_-]{16,}"),
)

# A path that begins at the root or at home, after anything that can precede one in a command or a message.
_PATH = re.compile(r"(?<![\w.:/~-])(?:file://)?~?/(?:[^\s'\",\]/]+/)*([^\s'\",\]/]+)/?")


def redacted(value: Any, key: str = "") -> Any:
    """The same JSON value without secrets: logins and secret queries in URLs, values of keys named like a secret,
    variables of an environment that a message quotes, and what looks like a token of a known hub.

    >>> redacted({"tracking": "http://me:pw@host/", "api_key": "x"})
    {'tracking': 'http://***@host/', 'api_key': '***'}
    >>> redacted("cannot clone git+https://tok@host/x.git?private_token=abc&depth=1 with HF_TOKEN='abc'")
    "cannot clone git+https://***@host/x.git?private_token=***&depth=1 with HF_TOKEN='***'"
    """
    if isinstance(value, Mapping):
        return {str(k): redacted(v, str(k)) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(item, key) for item in value]
    if not isinstance(value, str) or not value:
        return value
    if _SECRET_KEY.search(key):
        return "***"
    for secret in _SECRETS:
        value = secret.sub(_masked, value)
    return value


def _masked(found: re.Match[str]) -> str:
    quote = (found.groupdict().get("value") or "")[:1]
    return f"{found[1]}{quote}***{quote}" if quote in ("'", '"') else f"{found[1]}***"


def unmasked(uri: str) -> str:
    """A URI that was redacted without the mark of the login, so that credentials come from the environment.

    >>> unmasked("s3://***@bucket/x")
    's3://bucket/x'
    """
    return uri.replace("://***@", "://")


def portable(value: Any) -> Any:
    """The same text, or JSON value, without secrets and without the folders of this machine.

    >>> portable({"model": "/home/me/models/olmoe", "command": "run task=/data/q.yaml", "uri": "s3://me:pw@bucket/x"})
    {'model': 'olmoe', 'command': 'run task=path/to/q.yaml', 'uri': 's3://***@bucket/x'}
    """
    if isinstance(value, Mapping):
        return {str(key): redacted(portable(item), str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [portable(item) for item in value]
    if not isinstance(value, str):
        return value
    text = redacted(value)
    if text.startswith(("/", "~/")) and not re.search(r"[\s,]", text):  # a path and nothing else: its name
        return Path(text).name or text
    return _PATH.sub(r"path/to/\1", text)


def portable_command(command: str) -> str:
    """A command line for another machine: without what says where a study runs, and without this one's folders."""
    return shlex.join(portable(word) for word in portable_words(command))


def redacted_command(command: str) -> str:
    """A command line without passwords, word by word: a secret in a quoted word ends before the quote."""
    return shlex.join(redacted(word) for word in words.shell_words(command))
