"""A server with TLS, and the certificates that go with it."""

from pathlib import Path

import trustme

from servers import HOST, Server, free_port


class Secure:
    """A server with TLS, and the certificates that go with it."""

    def __init__(self, directory: Path, kind: str, *args: str, ask_clients: str = "optional", host: str = HOST) -> None:
        """Make the certificates, and prepare the server; `host` is what its own certificate says."""
        self.directory = directory
        self.authority = trustme.CA()
        self.ca = directory / "ca.pem"
        self.authority.cert_pem.write_to_path(str(self.ca))
        self.cert, self.key = self.issue("server", host)
        self.port = free_port()
        files = ("--tls-cert-file", self.cert, "--tls-key-file", self.key, "--tls-ca-cert-file", self.ca)
        tls = ("--tls-port", str(self.port), "--tls-auth-clients", ask_clients, *map(str, files))
        self.server = Server(kind, directory, *tls, *args)

    @property
    def url(self) -> str:
        """Return the URL with TLS."""
        return f"rediss://{HOST}:{self.port}/0"

    def issue(self, name: str, *identities: str, authority: trustme.CA | None = None) -> tuple[Path, Path]:
        """Return the files of a new certificate and its key."""
        issued = (authority or self.authority).issue_cert(*identities)
        cert, key = self.directory / f"{name}.pem", self.directory / f"{name}.key"
        issued.cert_chain_pems[0].write_to_path(str(cert))
        issued.private_key_pem.write_to_path(str(key))
        return cert, key
