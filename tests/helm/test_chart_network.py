"""The chart's network policies, which are not compared as text: they are applied to every pair of pods."""

from collections.abc import Mapping
from ipaddress import ip_address, ip_network
from typing import Any, Final

import pytest
from helm_chart import NAMESPACE, PORTS, Document, notes, of_kind, workloads

Peer = tuple[str, Mapping[str, Any]]


class Network:
    """The policies of one rendering, applied as the API defines them: what none of them lets through is denied."""

    def __init__(self, case: str) -> None:
        self.policies = [each["spec"] for each in of_kind(case, "NetworkPolicy")]
        self.pods = {part: each["spec"]["template"]["metadata"]["labels"] for part, each in workloads(case).items()}

    def arrows(self, ports: Mapping[str, int]) -> set[tuple[str, str]]:
        """Who reaches whom on the port where it listens; `world` is everybody else."""
        callers = {
            **{part: (NAMESPACE, labels) for part, labels in self.pods.items()},
            "world": ("elsewhere", {"app": "x"}),
        }
        return {
            (caller, called)
            for caller, (namespace, labels) in callers.items()
            for called, port in ports.items()
            if called in self.pods and caller != called
            and (caller == "world" or self.allows("egress", self.pods[caller], (NAMESPACE, self.pods[called]), port))
            and self.allows("ingress", self.pods[called], (namespace, labels), port)
        }  # fmt: skip

    def allows(
        self,
        direction: str,
        pod: Mapping[str, str],
        peer: Peer,
        port: int,
        protocol: str = "TCP",
    ) -> bool:
        """Whether a policy lets this pod and this peer speak on this port."""
        applied = [each for each in self.policies if direction.capitalize() in each["policyTypes"]]
        mine = [each for each in applied if each["podSelector"]["matchLabels"].items() <= pod.items()]
        rules = [rule for policy in mine for rule in policy.get(direction) or []]
        return not mine or any(self._passes(rule, direction, peer, port, protocol) for rule in rules)

    def _passes(self, rule: Document, direction: str, peer: Peer, port: int, protocol: str) -> bool:
        if {"protocol": protocol, "port": port} not in rule["ports"]:
            return False
        peers = rule.get("to" if direction == "egress" else "from")
        return peers is None or any(self._is(each, peer) for each in peers)

    def _is(self, described: Document, peer: Peer) -> bool:
        namespace, labels = peer
        if "ipBlock" in described:
            return labels == described
        wanted = described.get("namespaceSelector", {}).get("matchLabels", {"kubernetes.io/metadata.name": NAMESPACE})
        of_namespace = wanted == {"kubernetes.io/metadata.name": namespace}
        return of_namespace and bool(described["podSelector"]["matchLabels"].items() <= labels.items())


ARROWS: Final = {
    ("world", "proxy"),
    ("proxy", "gateway"),
    ("proxy", "fl-server"),
    ("proxy", "mlflow"),
    ("fl-server", "gateway"),
    ("fl-server", "mlflow"),
    ("gateway", "mlflow"),
}
NAME_SERVICE: Final = ("kube-system", {"k8s-app": "kube-dns"})


@pytest.mark.parametrize("case", ["coordinator", "both", "postgres", "ingress"])
def test_the_policies_let_through_what_the_architecture_draws_and_nothing_else(case: str) -> None:
    # A hospital in the same namespace comes in by the door that all hospitals use.
    site = {("site", "proxy")} if case == "both" else set()
    assert Network(case).arrows(PORTS) == ARROWS | site


def test_a_pod_of_the_release_that_no_policy_knows_is_cut_off() -> None:
    network = Network("coordinator")
    stranger = {**network.pods["gateway"], "app.kubernetes.io/component": "stranger"}
    for direction in ("ingress", "egress"):
        assert not network.allows(direction, stranger, NAME_SERVICE, 53, "UDP")
        assert not network.allows(direction, stranger, (NAMESPACE, network.pods["gateway"]), 8000)


def test_without_mlflow_nobody_may_speak_to_it() -> None:
    assert Network("own-tls").arrows(PORTS) == {arrow for arrow in ARROWS if "mlflow" not in arrow}


def test_a_tunnel_leads_to_the_proxy_and_to_addresses_outside_and_nobody_in() -> None:
    network = Network("tunnel")
    assert network.arrows(PORTS) == ARROWS | {("tunnel", "proxy")}
    tunnel, outside = network.pods["tunnel"], of_kind("tunnel", "NetworkPolicy")
    mine = [each["spec"] for each in outside if each["spec"]["podSelector"]["matchLabels"].items() <= tunnel.items()]
    blocks = [
        (ip_network(peer["ipBlock"]["cidr"]), [ip_network(each) for each in peer["ipBlock"]["except"]], rule["ports"])
        for policy in mine
        for rule in policy["egress"]
        for peer in rule["to"]
        if "ipBlock" in peer
    ]
    ((everywhere, left_out, ports),) = blocks
    assert ports == [{"protocol": "TCP", "port": 443}] and everywhere.prefixlen == 0
    for private in ("10.1.2.3", "100.64.0.1", "169.254.169.254", "172.31.0.1", "192.168.0.1"):
        assert any(ip_address(private) in each for each in left_out)
    assert not any(ip_address("203.0.113.5") in each for each in left_out)
    anywhere = ("elsewhere", {"app": "x"})
    assert not [port for port in range(1, 65536) if network.allows("ingress", tunnel, anywhere, port)]
    assert network.allows("egress", tunnel, NAME_SERVICE, 53, "UDP")


@pytest.mark.parametrize("case", ["coordinator", "both"])
def test_other_ports_are_shut(case: str) -> None:
    network = Network(case)
    # The SuperLink's own port, and the proxy's plain door to MLflow, which is for kubectl port-forward.
    assert network.arrows({"fl-server": 9092, "proxy": 8080, "gateway": 443, "mlflow": 8080}) == set()


@pytest.mark.parametrize("case", ["site", "both"])
def test_a_hospital_speaks_out_over_tls_and_hears_nobody(case: str) -> None:
    network, site = Network(case), workloads(case)["site"]["spec"]["template"]["metadata"]["labels"]
    anywhere = ("elsewhere", {"app": "x"})
    out = {port for port in range(1, 65536) if network.allows("egress", site, anywhere, port)}
    assert out == {443, 8443}
    assert network.allows("egress", site, NAME_SERVICE, 53, "UDP")
    mine = [each for each in network.policies if each["podSelector"]["matchLabels"].items() <= site.items()]
    assert [each["ingress"] for each in mine] == [[], []]


def test_a_hospital_behind_a_proxy_speaks_to_that_alone() -> None:
    network, site = Network("gpu"), workloads("gpu")["site"]["spec"]["template"]["metadata"]["labels"]
    anywhere = ("elsewhere", {"app": "x"})
    assert [port for port in (80, 443, 3128, 8443) if network.allows("egress", site, anywhere, port)] == [3128]


PACS: Final = ("imaging", {"app": "orthanc"})


def test_a_hospital_speaks_to_its_pacs_where_it_has_one() -> None:
    network, site = Network("pacs"), workloads("pacs")["site"]["spec"]["template"]["metadata"]["labels"]
    assert network.allows("egress", site, PACS, 8043)
    assert not network.allows("egress", site, ("elsewhere", {"app": "orthanc"}), 8043)
    assert not network.allows("ingress", site, PACS, 8043)
    network, site = Network("gpu"), workloads("gpu")["site"]["spec"]["template"]["metadata"]["labels"]
    assert network.allows("egress", site, ("", {"ipBlock": {"cidr": "203.0.113.40/32"}}), 8444)
    assert not network.allows("egress", site, PACS, 8444)
    network, site = Network("site"), workloads("site")["site"]["spec"]["template"]["metadata"]["labels"]
    assert not network.allows("egress", site, PACS, 8043)


@pytest.mark.parametrize("case", ["coordinator", "postgres"])
def test_who_needs_names_may_ask_for_them(case: str) -> None:
    network = Network(case)
    service = ("dns", {"app": "coredns"}) if case == "postgres" else NAME_SERVICE
    askers = {part for part, pod in network.pods.items() if network.allows("egress", pod, service, 53, "UDP")}
    # MLflow calls nobody but its database.
    assert askers == {"gateway", "fl-server", "proxy"} | ({"mlflow"} if case == "postgres" else set())


def test_postgresql_is_reached_by_those_who_use_it() -> None:
    network = Network("postgres")
    for server in (("databases", {"app": "postgres"}), ("", {"ipBlock": {"cidr": "203.0.113.20/32"}})):
        callers = {part for part, pod in network.pods.items() if network.allows("egress", pod, server, 5432)}
        assert callers == {"gateway", "mlflow"}


PROMETHEUS: Final = ("monitoring", {"app.kubernetes.io/name": "prometheus"})
METRICS_PORT: Final = 9464


def test_prometheus_reaches_the_proxys_page_of_figures_when_it_is_named_and_nothing_else() -> None:
    network = Network("postgres")
    ports = (METRICS_PORT, *PORTS.values(), 8080, 9092)
    reached = {
        (part, port)
        for part, pod in network.pods.items()
        for port in ports
        if network.allows("ingress", pod, PROMETHEUS, port)
    }
    assert reached == {("proxy", METRICS_PORT), ("proxy", PORTS["proxy"])}
    network = Network("coordinator")
    assert not network.allows("ingress", network.pods["proxy"], PROMETHEUS, METRICS_PORT)


def test_only_the_proxy_fetches_figures_on_a_port_of_their_own() -> None:
    metrics = dict.fromkeys(PORTS, METRICS_PORT)
    assert Network("postgres").arrows(metrics) == {("proxy", "mlflow")}


def test_a_hospital_shows_its_figures_to_its_own_prometheus_alone() -> None:
    network, site = Network("gpu"), workloads("gpu")["site"]["spec"]["template"]["metadata"]["labels"]
    assert network.allows("ingress", site, PROMETHEUS, METRICS_PORT)
    assert not network.allows("ingress", site, ("elsewhere", {"app": "x"}), METRICS_PORT)
    assert not network.allows("ingress", site, PROMETHEUS, PORTS["proxy"])


def test_the_policies_can_be_left_out_and_the_notes_say_so() -> None:
    assert of_kind("open-network", "NetworkPolicy") == []
    assert "network policies are off" in notes("open-network")
