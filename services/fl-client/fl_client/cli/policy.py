"""The policy that a named person signs, so that runs which it allows need nobody's answer."""

from datetime import timedelta
from typing import Any, Final

import click

from fl_client.cli.installation import open_site, signing_person
from fl_client.policy import PolicyBody, load_policy, policy_path, remove_policy, sign_policy
from medhive.spec import MAX_LOCAL_EPOCHS
from medhive.terminal import Group, Terminal, moment, pass_terminal

DEFAULT_DAYS: Final = 90.0  # a quarter: long enough to be useful, short enough to be thought of again


@click.group(cls=Group, invoke_without_command=True)
@click.pass_context
def policy(context: click.Context) -> None:
    """The signed policy that may agree to runs by itself; alone, show it. Without one, a person answers."""
    if context.invoked_subcommand is None:
        context.invoke(show_policy)


@policy.command("show")
@pass_terminal
def show_policy(terminal: Terminal) -> None:
    """Show the policy in force."""
    with open_site() as site:
        body = load_policy(site)
        path = policy_path(site)
    value = {"policy": body.model_dump(mode="json") if body else None, "file": str(path)}
    terminal.result(value, lambda: _show(terminal, body))


def _show(terminal: Terminal, body: PolicyBody | None) -> None:
    if body is None:
        terminal.line("There is no policy: a person answers each run.")
        return
    terminal.fields(
        [
            ("studies", ", ".join(body.studies)),
            ("most rounds", body.max_rounds),
            ("most local epochs", body.max_local_epochs),
            ("fewest sites", body.min_sites),
            ("strategies", ", ".join(body.strategies) or "all"),
            ("signed", f"{moment(body.issued_at)} by {body.person}"),
            ("until", moment(body.expires_at)),
        ]
    )


@policy.command("sign")
@click.option("--study", "studies", multiple=True, help="A study that it allows; may be repeated.")
@click.option("--max-rounds", type=int, help="The most rounds of a run, or contributions to a queue.")
@click.option(
    "--max-local-epochs", type=int, default=MAX_LOCAL_EPOCHS, show_default=True, help="The most local epochs."
)
@click.option("--min-sites", type=int, default=2, show_default=True, help="The fewest sites of a run or a queue.")
@click.option("--strategy", "strategies", multiple=True, help="A strategy that it allows [all]; may be repeated.")
@click.option("--days", type=float, default=DEFAULT_DAYS, show_default=True, help="Days that it is in force.")
@click.option("--person", help="Who signs and answers for it.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@pass_terminal
def sign_new_policy(terminal: Terminal, /, studies: tuple[str, ...], max_rounds: int | None, **given: Any) -> None:
    """Sign a policy; it replaces the one in force."""
    with open_site() as site:
        if not studies:
            studies = (terminal.ask(None, "Study", "--study"),)
        if max_rounds is None:
            if not terminal.interactive:
                raise click.UsageError("Missing --max-rounds.")
            max_rounds = int(click.prompt("Most rounds", default=10, type=click.IntRange(1), err=True))
        name = signing_person(terminal, site, given["person"])
        terminal.confirm(f"Let {site.name} agree by itself to runs and queues of {', '.join(studies)}?", given["yes"])
        signed = sign_policy(
            site,
            person=name,
            studies=studies,
            max_rounds=max_rounds,
            valid_for=timedelta(days=given["days"]),
            max_local_epochs=given["max_local_epochs"],
            min_sites=given["min_sites"],
            strategies=given["strategies"],
        )
        path = policy_path(site)
    value = {"policy": signed.body.model_dump(mode="json"), "file": str(path)}
    terminal.result(value, lambda: _show(terminal, signed.body))


@policy.command("remove")
@pass_terminal
def remove(terminal: Terminal) -> None:
    """Take the policy out of force: a person answers again."""
    with open_site() as site:
        existed = remove_policy(site)
    text = "The policy is no longer in force." if existed else "There was no policy."
    terminal.result({"removed": existed}, lambda: terminal.line(text))
