"""Studies: what is asked, of which data, by whom; each has one line of model versions."""

from sqlalchemy import func, select

from api_gateway import members
from api_gateway.events import Kind
from api_gateway.models import Member, Study, Version
from api_gateway.work import Work
from medhive.errors import Conflict, InvalidInput
from medhive.spec import RunOptions, StudyData, build_options
from medhive.strategies import make_strategy
from medhive.wire import NewStudy, StudyAnswer

TABLE_TASK = "tabular"


def create(work: Work, body: NewStudy) -> StudyAnswer:
    """Make a study.

    Raises:
        Conflict: the name is taken.
        InvalidInput: the defaults or the data's description do not fit.
        NotFound: a member does not exist.
    """
    if work.session.get(Study, body.name) is not None:
        raise Conflict(f"There is a study {body.name} already.", study=body.name)
    if (body.task == TABLE_TASK) != (body.data.table is not None):
        raise InvalidInput(f"Studies of the task {TABLE_TASK}, and only they, describe a table's columns.")
    checked_options(body.task, body.defaults, {})
    row = Study(
        name=body.name,
        title=body.title,
        task=body.task,
        data=body.data.model_dump(mode="json"),
        defaults=dict(body.defaults),
        created_at=work.now,
    )
    work.session.add(row)
    work.session.flush()
    work.record(Kind.STUDY_CREATED, f"study {body.name}", study=body.name, task=body.task)
    for site in dict.fromkeys(body.members):
        members.add(work, body.name, site)
    return to_answer(work, row)


def checked_options(task: str, defaults: dict[str, object], chosen: dict[str, object]) -> RunOptions:
    """The options of a run, when this version can honour each of them.

    Raises:
        InvalidInput: out of range, unknown, or nothing that this version can do.
    """
    options = build_options(task, defaults, chosen)
    options.privacy.require_supported()
    strategy = make_strategy(options.strategy, options.strategy_params)
    if options.min_sites < strategy.min_updates:
        raise InvalidInput(
            f"The strategy {options.strategy} needs at least {strategy.min_updates} sites; min_sites is "
            f"{options.min_sites}.",
            min_updates=strategy.min_updates,
        )
    return options


def listed(work: Work) -> list[StudyAnswer]:
    """The studies that the caller may see, by name."""
    query = select(Study).order_by(Study.name)
    if not work.caller.sees_all:
        query = query.join(Member, Member.study == Study.name).where(Member.site == work.own_site())
    return [to_answer(work, row) for row in work.session.scalars(query)]


def to_answer(work: Work, row: Study) -> StudyAnswer:
    """The study on the wire."""
    sites = select(Member.site).where(Member.study == row.name).order_by(Member.site)
    newest = select(func.max(Version.number)).where(Version.study == row.name)
    return StudyAnswer(
        name=row.name,
        title=row.title,
        task=row.task,
        data=StudyData.model_validate(row.data),
        defaults=row.defaults,
        members=tuple(work.session.scalars(sites)),
        newest_version=work.session.scalar(newest),
        created_at=row.created_at,
    )
