"""Hospitals: inviting, listing, shutting out."""

import os
from pathlib import Path

import click

from api_gateway.admin.session import connect
from medhive.terminal import Command, Terminal, build, moment, pass_terminal
from medhive.views import sites_table, software_text
from medhive.wire import API, AddressTrust, InviteAnswer, NewInvite, Reason, SiteAnswer, TunnelAnswer

HOUR_S = 3600.0


@click.command(cls=Command)
@click.argument("site", required=False)
@click.option("--study", "studies", multiple=True, help="A study that the hospital joins as a member; may be repeated.")
@click.option(
    "--evaluate-only",
    "evaluates_only",
    is_flag=True,
    help="The site has a test set: it judges each round, and never trains.",
)
@click.option("--expires-in-h", type=float, default=168.0, show_default=True, help="Hours until the invite is void.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the JOIN_TOKEN to a file of mode 0600.")
@click.option("--list", "listing", is_flag=True, help="List the invites.")
@click.option("--delete", "delete_id", type=int, metavar="ID", help="Delete an invite that is not used yet.")
@pass_terminal
def invite(
    terminal: Terminal,
    /,
    *,
    site: str | None,
    studies: tuple[str, ...],
    evaluates_only: bool,
    expires_in_h: float,
    out: Path | None,
    listing: bool,
    delete_id: int | None,
) -> None:
    """Make a one-time invite (JOIN_TOKEN) for the hospital SITE; it is shown once."""
    if listing:
        _list_invites(terminal)
    elif delete_id is not None:
        with connect() as client:
            client.delete(f"{API}/invites/{delete_id}")
        terminal.result({"deleted": delete_id}, lambda: terminal.line(f"Invite {delete_id} is void."))
    else:
        name = terminal.ask(site, "Name of the hospital", "SITE")
        given = {"studies": studies, "evaluates_only": evaluates_only, "expires_in_s": expires_in_h * HOUR_S}
        _make_invite(terminal, build(NewInvite, site=name, **given), out)


def _make_invite(terminal: Terminal, wanted: NewInvite, out: Path | None) -> None:
    # The file is opened first: a token that cannot be written would be lost, because it is told only once.
    descriptor = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600) if out else None
    try:
        with connect() as client:
            made = InviteAnswer.model_validate(client.post(f"{API}/invites", wanted))
    except BaseException:
        if out and descriptor is not None:
            os.close(descriptor)
            out.unlink()
        raise
    if descriptor is not None:
        with os.fdopen(descriptor, "w") as file:
            file.write(f"{made.token}\n")
        made = made.model_copy(update={"token": None})
    terminal.result(made, lambda: _show_invite(terminal, made, out))


def _show_invite(terminal: Terminal, made: InviteAnswer, out: Path | None) -> None:
    terminal.fields(
        [
            ("invite", made.id),
            ("site", made.site),
            ("studies", ", ".join(made.studies)),
            ("role", "evaluates only" if made.evaluates_only else ""),
            ("expires", moment(made.expires_at)),
            ("JOIN_TOKEN", made.token or f"in {out}"),
        ]
    )
    terminal.note(f"Hand the token to {made.site}; there: CLIENT_ID={made.site} medhive-site join. It works once.")


def _list_invites(terminal: Terminal) -> None:
    with connect() as client:
        found = [InviteAnswer.model_validate(row) for row in client.get(f"{API}/invites")]
    rows = [
        [
            item.id,
            item.site,
            ", ".join(item.studies),
            moment(item.created_at),
            moment(item.expires_at),
            moment(item.used_at),
        ]
        for item in found
    ]
    columns = ["invite>", "site", "studies", "created", "expires", "used"]
    terminal.result(found, lambda: terminal.table(columns, rows, "no invites"))


@click.command(cls=Command)
@click.argument("name", required=False)
@pass_terminal
def sites(terminal: Terminal, name: str | None) -> None:
    """List the hospitals, or show the one called NAME."""
    with connect() as client:
        if name is None:
            found = [SiteAnswer.model_validate(row) for row in client.get(f"{API}/sites")]
            terminal.result(found, lambda: sites_table(terminal, found))
            return
        site = SiteAnswer.model_validate(client.get(f"{API}/sites/{name}"))
    terminal.result(site, lambda: _show_site(terminal, site))


def _show_site(terminal: Terminal, site: SiteAnswer) -> None:
    terminal.fields(
        [
            ("site", site.name),
            ("state", site.state),
            ("node", "online" if site.node_online else "offline"),
            ("studies", ", ".join(site.studies)),
            ("joined", moment(site.joined_at)),
            ("last seen", moment(site.last_seen_at)),
            ("software", software_text(site)),
            ("address", site.source_address),
            ("consent key", site.consent_key_id),
        ]
    )


@click.command(cls=Command)
@pass_terminal
def tunnel(terminal: Terminal) -> None:
    """Show the tunnel's public address, which hospitals take as SERVER_ADDRESS; any invite serves with it."""
    with connect() as client:
        found = TunnelAnswer.model_validate(client.get(f"{API}/tunnel"))
    ends = (
        "ngrok, which reads what passes" if found.address_trust is AddressTrust.TUNNEL else "this coordinator's proxy"
    )
    terminal.result(
        found,
        lambda: (
            terminal.fields([("address", found.address), ("TLS ends at", ends)])
            if found.address
            else terminal.line("No tunnel is open.")
        ),
    )


@click.command(cls=Command)
@click.argument("site")
@click.option("--reason", help="Why; everybody can read it in the log.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@pass_terminal
def revoke(terminal: Terminal, site: str, reason: str | None, yes: bool) -> None:
    """Shut the hospital SITE out, at once and for good; its runs go on without it."""
    reason = terminal.ask(reason, "Reason", "--reason", "")
    terminal.confirm(f"Shut {site} out for good?", yes)
    with connect() as client:
        answer = client.post(f"{API}/sites/{site}/revoke", build(Reason, reason=reason))
    terminal.result(answer or {"revoked": site}, lambda: terminal.line(f"{site} is revoked."))
