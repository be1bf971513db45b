"""Logging in, and people's accounts."""

from pathlib import Path
from typing import Final

import click

from api_gateway.admin.session import Session, confirmed, connect, fingerprint, full_address
from medhive.client import GatewayClient, Trust, introduce
from medhive.errors import InvalidInput
from medhive.terminal import Command, Group, Terminal, build, moment, pass_terminal
from medhive.wire import API, AccountAnswer, CoordinatorAnswer, Login, NewAccount, TokenAnswer

DEFAULT_ADDRESS: Final = "https://localhost:8443"


@click.command(cls=Command)
@click.argument("address", required=False)
@click.option("--username", help="Who logs in.")
@click.option(
    "--password-file", type=click.Path(path_type=Path), help="A file with the password, instead of typing it."
)
@click.option("--ca-file", type=click.Path(path_type=Path), help="The coordinator's CA certificate (tls/ca.crt).")
@click.option("--fingerprint", "expected", help="SHA-256 of the CA certificate, instead of its file.")
@click.option(
    "--public", is_flag=True, help="ADDRESS shows a certificate of a public CA: trust this system's roots too."
)
@pass_terminal
def login(
    terminal: Terminal,
    /,
    *,
    address: str | None,
    username: str | None,
    password_file: Path | None,
    ca_file: Path | None,
    expected: str | None,
    public: bool,
) -> None:
    """Log in to the coordinator at ADDRESS (https://HOST:PORT) and remember it."""
    address = full_address(terminal.ask(address, "Address of the coordinator", "ADDRESS", DEFAULT_ADDRESS))
    ca_pem = _trusted_ca(terminal, address, ca_file, expected)
    name = terminal.ask(username, "User name", "--username", "admin")
    password = terminal.ask_secret(password_file, "Password", "--password-file")
    with GatewayClient(address, Trust(ca_pem=ca_pem, system=public)) as client:
        coordinator = CoordinatorAnswer.model_validate(client.get(f"{API}/coordinator"))
        credentials = build(Login, username=name, password=password)
        token = TokenAnswer.model_validate(client.post(f"{API}/login", credentials))
        warnings = ending_certificates(client)
    session = Session(
        address=address,
        ca_pem=ca_pem,
        coordinator_key=coordinator.public_key,
        name=token.name,
        role=token.role,
        token=token.token,
        expires_at=token.expires_at.isoformat(),
        public=public,
    )
    path = session.save()
    answer = {"name": token.name, "role": token.role, "coordinator": coordinator.name, "address": address}
    who = f"{coordinator.name} as {token.name} ({token.role})"
    text = f"Logged in to {who} until {moment(token.expires_at)}; kept in {path}."
    for warning in warnings:
        terminal.note(warning)
    terminal.result({**answer, "expires_at": session.expires_at, "file": str(path)}, lambda: terminal.line(text))


def ending_certificates(client: GatewayClient) -> list[str]:
    """What an admin is told of certificates that end within 30 days and that the gateway cannot renew."""
    names = {"own": "your own certificate at the proxy (TLS_CERT_FILE)", "ca": "the coordinator's CA"}
    return [
        f"WARNING: {names.get(each['certificate'], each['certificate'])} ends at {each['ends_at']}; see "
        "docs/deployment.md, 'Certificates and keys'."
        for each in client.get("/ready").get("certificates_ending", ())
    ]


def _trusted_ca(terminal: Terminal, address: str, ca_file: Path | None, expected: str | None) -> str:
    if ca_file is not None:
        try:
            ca_pem = ca_file.read_text(encoding="ascii")
        except (OSError, ValueError) as error:
            raise InvalidInput(f"Cannot read the CA certificate {ca_file}: {error}.") from error
        fingerprint(ca_pem)
        return ca_pem
    if expected is None and not terminal.interactive:
        raise click.UsageError("Give --ca-file or --fingerprint, so that the coordinator can be trusted.")
    ca_pem = introduce(address).ca_certificate
    if expected is not None:
        confirmed(ca_pem, expected)
    else:
        terminal.note(f"The coordinator's CA has the fingerprint {fingerprint(ca_pem)}")
        terminal.confirm("Is it the one that the coordinator's `medhive-gateway serve` shows?", yes=False)
    return ca_pem


@click.group(cls=Group, invoke_without_command=True)
@click.pass_context
def accounts(context: click.Context) -> None:
    """People's accounts; alone, list them."""
    if context.invoked_subcommand is None:
        context.invoke(list_accounts)


@accounts.command("list")
@pass_terminal
def list_accounts(terminal: Terminal) -> None:
    """List the accounts."""
    with connect() as client:
        found = [AccountAnswer.model_validate(row) for row in client.get(f"{API}/accounts")]
    rows = [
        [item.username, item.role, item.site, moment(item.created_at), "disabled" if item.disabled else "active"]
        for item in found
    ]
    terminal.result(found, lambda: terminal.table(["name", "role", "site", "created", "state"], rows, "no accounts"))


@accounts.command("add")
@click.argument("username")
@click.option("--role", type=click.Choice(["admin", "analyst", "site"]), help="What the person may do.")
@click.option("--site", help="For role site: the hospital whose person it is.")
@click.option("--password-file", type=click.Path(path_type=Path), help="A file with the password; else one is made up.")
@pass_terminal
def add_account(
    terminal: Terminal, username: str, role: str | None, site: str | None, password_file: Path | None
) -> None:
    """Add an account; its password is printed once, when it is made up."""
    role = terminal.ask(
        role, "Role", "--role", "analyst" if terminal.interactive else None, ["admin", "analyst", "site"]
    )
    password = terminal.ask_secret(password_file, "Password", "--password-file") if password_file else None
    if role == "site":
        site = terminal.ask(site, "Hospital", "--site")
    with connect() as client:
        body = build(NewAccount, username=username, role=role, site=site, password=password)
        account = AccountAnswer.model_validate(client.post(f"{API}/accounts", body))
    terminal.result(account, lambda: _show_account(terminal, account))


def _show_account(terminal: Terminal, account: AccountAnswer) -> None:
    terminal.fields(
        [("name", account.username), ("role", account.role), ("site", account.site), ("password", account.password)]
    )
    if account.password:
        terminal.note("The password is shown this once; hand it over on a safe way.")


@accounts.command("remove")
@click.argument("username")
@click.option("--yes", is_flag=True, help="Do not ask.")
@pass_terminal
def remove_account(terminal: Terminal, username: str, yes: bool) -> None:
    """Take an account out of use; its logins end at once, its name stays in the log."""
    terminal.confirm(f"Take the account {username} out of use?", yes)
    with connect() as client:
        client.delete(f"{API}/accounts/{username}")
    terminal.result({"removed": username}, lambda: terminal.line(f"{username} is out of use."))


@accounts.command("password")
@click.argument("username")
@click.option("--password-file", type=click.Path(path_type=Path), help="A file with the new password.")
@click.option("--generate", is_flag=True, help="Let the coordinator make one up and print it.")
@pass_terminal
def change_password(terminal: Terminal, username: str, password_file: Path | None, generate: bool) -> None:
    """Set an account's password."""
    password = None if generate else terminal.ask_secret(password_file, "New password", "--password-file", twice=True)
    with connect() as client:
        account = AccountAnswer.model_validate(
            client.post(f"{API}/accounts/{username}/password", {"password": password})
        )
    terminal.result(account, lambda: _show_account(terminal, account))


@accounts.command("revoke-tokens")
@click.argument("username")
@pass_terminal
def revoke_tokens(terminal: Terminal, username: str) -> None:
    """End every login of an account."""
    with connect() as client:
        client.post(f"{API}/accounts/{username}/revoke-tokens")
    terminal.result({"revoked": username}, lambda: terminal.line(f"Every login of {username} has ended."))
