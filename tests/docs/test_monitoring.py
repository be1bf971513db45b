"""Dashboard, alarms and document name what the services really show, each of their metrics and no other."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from api_gateway.__main__ import build
from api_gateway.monitoring import Exchanges, registry_of
from api_gateway.settings import Settings as GatewaySettings
from fl_client.monitoring import Figures as SiteFigures
from fl_client.monitoring import Looked
from fl_client.settings import Settings as SiteSettings
from fl_client.store import Store
from fl_server.monitoring import Figures as ServerFigures
from fl_server.monitoring import Leases

ROOT: Final = Path(__file__).parents[2]
DOCUMENT: Final = (ROOT / "docs" / "monitoring.md").read_text("utf-8")
DASHBOARD: Final = ROOT / "deploy" / "grafana" / "medhive.json"
ALERTS: Final = ROOT / "deploy" / "prometheus" / "alerts.yaml"
NAME: Final = re.compile(r"\b(?:medhive|mlflow|process)_[a-z0-9_]+")
HISTOGRAM: Final = re.compile(r"_(bucket|sum|count)$")
# Shown by MLflow itself; tests/fl_server/test_tracking_server.py sees them at a real one.
OF_MLFLOW: Final = {"mlflow_http_request_total", "mlflow_http_request_duration_seconds"}


def names_in(page: str) -> set[str]:
    """The names on a page of figures, as queries use them; a histogram by its own."""
    families = list(text_string_to_metric_families(page))
    return {family.name + ("_total" if family.type == "counter" else "") for family in families}


def page_of(registry: CollectorRegistry) -> str:
    return generate_latest(registry).decode()


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """What each program shows, of its real registry over a real, empty state folder."""
    folder = tmp_path_factory.mktemp("monitoring")
    gateway, _ = build(GatewaySettings(state_dir=folder / "gateway"))
    registry = registry_of(gateway, lambda: "ok")
    Exchanges(registry)
    server = ServerFigures(folder)
    server.registry.register(Leases(tuple))
    site = SiteFigures(SiteSettings(state_dir=folder), lambda _event: None)
    site.registry.register(Looked(Store(folder / "site.db"), lambda: 0))
    proxy = re.findall(r"# HELP (\w+)", (ROOT / "deploy" / "proxy" / "nginx.conf.in").read_text("utf-8"))
    try:
        pages = {
            "gateway": page_of(registry),
            "fl-server": page_of(server.registry),
            "hospital": page_of(site.registry),
        }
    finally:
        gateway.database.close()
    return {name: names_in(page) for name, page in pages.items()} | {"proxy": set(proxy), "mlflow": OF_MLFLOW}


def own(names: set[str]) -> set[str]:
    return {name for name in names if not name.startswith("process_")}


def documented(section: str) -> set[str]:
    body = re.split(r"(?m)^##+ ", DOCUMENT.split(f"# {section}\n")[1])[0]
    return set(re.findall(r"`((?:medhive|mlflow)_[a-z0-9_]+)`", body))


@pytest.mark.parametrize("service", ["gateway", "fl-server", "hospital", "proxy", "mlflow"])
def test_the_document_lists_what_a_service_shows(shown: dict[str, set[str]], service: str) -> None:
    everywhere = documented("What there is") if service not in {"proxy", "mlflow"} else set()
    assert documented(service) | everywhere == own(shown[service])


def expressions() -> dict[str, str]:
    """Every query of the dashboard and the alarms, by its title."""
    panels = json.loads(DASHBOARD.read_text("utf-8"))["panels"]
    queries = {
        f"{panel['title']} {target['refId']}": target["expr"] for panel in panels for target in panel.get("targets", [])
    }
    rules = [rule for group in yaml.safe_load(ALERTS.read_text("utf-8"))["groups"] for rule in group["rules"]]
    return queries | {rule["alert"]: rule["expr"] for rule in rules}


def test_every_query_asks_for_metrics_that_are_shown(shown: dict[str, set[str]]) -> None:
    known = set().union(*shown.values())
    for title, query in expressions().items():
        asked = {name if name in known else HISTOGRAM.sub("", name) for name in NAME.findall(query)}
        assert asked <= known, title


def test_every_metric_is_on_the_dashboard_or_is_said_to_be_of_no_use_there(shown: dict[str, set[str]]) -> None:
    asked = {HISTOGRAM.sub("", name) for query in expressions().values() for name in NAME.findall(query)}
    left_out = own(set().union(*shown.values())) - asked
    assert left_out == {"mlflow_http_request_duration_seconds"}


def test_the_dashboard_is_one_that_grafana_takes() -> None:
    """As far as its model says without Grafana: unique panels, inside the grid, none over another, each with a source."""
    dashboard: dict[str, Any] = json.loads(DASHBOARD.read_text("utf-8"))
    panels = dashboard["panels"]
    assert dashboard["title"] and dashboard["schemaVersion"] >= 36 and dashboard["time"]["from"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24 and not cells & taken, panel["title"]
        taken |= cells
        if panel["type"] != "row":
            assert panel["type"] in {"stat", "timeseries"} and panel["targets"], panel["title"]
            assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${datasource}"}
    assert [each["type"] for each in dashboard["templating"]["list"]] == ["datasource"]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian's package prometheus)")
def test_promtool_takes_the_alarms_the_queries_and_the_scrape_config(tmp_path: Path) -> None:
    groups = yaml.safe_load(ALERTS.read_text("utf-8"))["groups"]
    # A query is checked as the rule that records it.
    queries = [{"record": f"query:{number}", "expr": query} for number, query in enumerate(expressions().values())]
    rules, config = tmp_path / "rules.yaml", tmp_path / "prometheus.yaml"
    rules.write_text(yaml.safe_dump({"groups": [*groups, {"name": "queries", "rules": queries}]}))
    (tmp_path / "alerts.yaml").write_text(ALERTS.read_text("utf-8"))
    scrape = re.findall(r"(?ms)^```yaml\n(.+?)^```", DOCUMENT)[0]
    (tmp_path / "medhive-ca.crt").write_text("")
    config.write_text(scrape.replace("/etc/prometheus/medhive-ca.crt", str(tmp_path / "medhive-ca.crt")))
    for command in (["check", "rules", str(rules)], ["check", "config", str(config)]):
        done = subprocess.run(["promtool", *command], capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
