"""The Helm chart, rendered offline by Helm's own library with each values file of `tests/helm/values`."""

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final

import helm_python as helm
import yaml

ROOT: Final = Path(__file__).parents[2]
CHART: Final = ROOT / "deploy" / "helm" / "medhive"
VALUES: Final = ROOT / "tests" / "helm" / "values"
CASES: Final = sorted(path.stem for path in VALUES.glob("*.yaml"))
RELEASE: Final = "trial"
NAMESPACE: Final = "research"
PORTS: Final = {"gateway": 8000, "fl-server": 9093, "mlflow": 5000, "proxy": 8443}

Document = dict[str, Any]


class _OnceOnly(yaml.SafeLoader):
    """YAML in which a key may stand once; the last of two would silently win."""


def _mapping(loader: _OnceOnly, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]
    assert len(keys) == len(set(keys)), f"a key twice in {keys}"
    return loader.construct_mapping(node)


_OnceOnly.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def render(values: Mapping[str, Any]) -> dict[str, str]:
    """Template path to text, after the values were held against the schema, as an installation does it."""
    with helm.Chart.load(CHART) as chart:
        chart.validate_schema(dict(values))
        return chart.render(dict(values), name=RELEASE, namespace=NAMESPACE)


def read_yaml(text: str) -> Any:
    """One document in which no key stands twice."""
    return yaml.load(text, _OnceOnly)  # noqa: S506 - a SafeLoader


def values_of(case: str) -> dict[str, Any]:
    """What one of the values files sets."""
    values: dict[str, Any] = read_yaml((VALUES / f"{case}.yaml").read_text("utf-8"))
    return values


@cache
def rendered(case: str) -> dict[str, str]:
    """The chart with one of the values files."""
    return render(values_of(case))


def documents_of(texts: Mapping[str, str]) -> list[Document]:
    """Every object that would be made."""
    texts = {path: text for path, text in texts.items() if path.endswith(".yaml")}
    loaded = (document for text in texts.values() for document in yaml.load_all(text, _OnceOnly))
    return [document for document in loaded if document]


@cache
def documents(case: str) -> list[Document]:
    """Every object of one of the values files."""
    return documents_of(rendered(case))


def of_kind(case: str, *kinds: str) -> list[Document]:
    """The objects of these kinds."""
    return [document for document in documents(case) if document["kind"] in kinds]


def workloads(case: str) -> dict[str, Document]:
    """Component to its Deployment or StatefulSet."""
    found = of_kind(case, "Deployment", "StatefulSet")
    return {each["metadata"]["labels"]["app.kubernetes.io/component"]: each for each in found}


def pod_of(workload: Document) -> Document:
    """The specification of its pod."""
    spec: Document = workload["spec"]["template"]["spec"]
    return spec


def main_of(workload: Document) -> Document:
    """The service's own container."""
    container: Document = pod_of(workload)["containers"][0]
    return container


def volume_of(workload: Document, name: str) -> Document:
    """One of the pod's volumes."""
    return next(each for each in pod_of(workload)["volumes"] if each["name"] == name)


def containers_of(workload: Document) -> list[Document]:
    """All of its containers, those that prepare it too."""
    pod = pod_of(workload)
    return [*pod.get("initContainers", []), *pod["containers"]]


def environment_of(workload: Document) -> dict[str, str | None]:
    """The variables of the service's own container; None for one whose value comes from a Secret."""
    return {each["name"]: each.get("value") for each in main_of(workload).get("env", [])}


def every_container() -> Iterator[tuple[str, str, Document]]:
    """Case, component and container, of all cases."""
    for case in CASES:
        for part, workload in workloads(case).items():
            for container in containers_of(workload):
                yield case, part, container


def notes(case: str) -> str:
    """What Helm prints after an installation."""
    return next(text for path, text in rendered(case).items() if path.endswith("NOTES.txt"))
