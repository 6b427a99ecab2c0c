"""Arguments that the servers and pages share: where they listen, how they batch, and what they accept."""

from dataclasses import dataclass, field

from medicalgpt.args import ChatArguments


@dataclass
class ServeArguments(ChatArguments):
    """A front end for several users at a time. The settings of ChatArguments are the defaults of a request."""

    host: str = field(
        default="127.0.0.1",
        metadata={
            "help": "Address to listen on. The default accepts connections from this machine only.",
            "aliases": ["--server_name"],
        },
    )
    port: int = field(
        default=8000, metadata={"help": "Port to listen on; 0 takes a free one.", "aliases": ["--server_port"]}
    )
    max_batch_size: int = field(default=16, metadata={"help": "Maximum number of answers generated together."})
    max_waiting: int = field(
        default=64, metadata={"help": "Maximum number of queued requests; further ones are rejected."}
    )
    batching: str = field(
        default="auto",
        metadata={
            "help": "How answers share memory while they are generated together. continuous: pages of a shared cache. "
            "static: a cache that is padded to the longest of them. auto: the faster one that the model supports.",
            "choices": ["auto", "static", "continuous"],
        },
    )
    request_timeout: float = field(
        default=300.0, metadata={"help": "Maximum number of seconds from a request to its answer."}
    )
    max_prompt_chars: int = field(
        default=500_000,
        metadata={"help": "Maximum number of characters of a prompt with all of its turns, checked before tokenizing."},
    )
    max_request_bytes: int = field(default=2_000_000, metadata={"help": "Maximum bytes of a request's body."})
    max_header_bytes: int = field(default=32_768, metadata={"help": "Maximum bytes of a request's line and headers."})
    max_connections: int = field(
        default=1000,
        metadata={"help": "Maximum number of connections; fewer if ulimit -n is lower. Idle ones make room first."},
    )
    header_timeout: float = field(
        default=10.0, metadata={"help": "Maximum number of seconds until a request's headers are complete."}
    )
    body_timeout: float = field(
        default=60.0, metadata={"help": "Maximum number of seconds until a request's body is complete."}
    )


@dataclass
class ApiArguments(ServeArguments):
    """An API server."""

    api_key: str | None = field(
        default=None,
        metadata={
            "help": "Key that every request must carry. Safer: the variable MEDICALGPT_API_KEY, since other users of "
            "the machine can read command lines."
        },
    )
    api_keys_file: str | None = field(
        default=None,
        metadata={
            "help": "File of keys with names, a line `name: key` for each client, that others cannot read (chmod 600). "
            "It is read again when it has changed."
        },
    )
    ssl_certfile: str | None = field(
        default=None, metadata={"help": "Certificate chain in PEM; the server then speaks HTTPS."}
    )
    ssl_keyfile: str | None = field(default=None, metadata={"help": "Private key of the certificate, unencrypted."})
    root_path: str | None = field(
        default=None, metadata={"help": "Prefix of the paths that a proxy removes before it passes requests on: /llm."}
    )
    forwarded_allow_ips: str = field(
        default="127.0.0.1,::1",
        metadata={
            "help": "Addresses or networks of proxies, with commas, whose X-Forwarded-For and X-Forwarded-Proto are "
            "believed."
        },
    )
    log_format: str = field(
        default="text", metadata={"help": "Lines of text, or JSON objects, one per line.", "choices": ["text", "json"]}
    )
    stop_timeout: float = field(
        default=60.0, metadata={"help": "Seconds that running answers have to finish when the server is stopped."}
    )


@dataclass
class PageArguments(ServeArguments):
    """A web page."""

    auth: str | None = field(
        default=None,
        metadata={"help": "user:password required by the page. Safer: the environment variable MEDICALGPT_AUTH."},
    )
    share: bool = field(default=False, metadata={"help": "Create a public link through Gradio's servers."})
    lang: str = field(
        default="auto",
        metadata={
            "help": "Language of the page. auto: Chinese or English, whichever the visitor's browser prefers.",
            "choices": ["auto", "en", "zh"],
        },
    )
    allow_origins: str | None = field(
        default=None,
        metadata={
            "help": "Further origins of the page, with commas, if a proxy changes the Host header (https://a.org)."
        },
    )
    max_prompt_chars: int = field(
        default=100_000,
        metadata={"help": "Maximum number of characters of a prompt with all of its turns, checked before tokenizing."},
    )
    body_timeout: float = field(
        default=300.0, metadata={"help": "Maximum number of seconds until a request's body, or an upload, is complete."}
    )
