"""The Helm chart as Kubernetes would get it: rendered offline as `helm template` does it; no cluster is asked.

Every values file of `values/` is held against the Kubernetes schemas (strictly: no field that the API does not know) and
against the rules that hold for every container. Each setting, and each wrong one, is looked at by itself.
"""

import re
from typing import Any, Final

import helm_python as helm
import kubernetes_validate  # type: ignore[import-untyped]
import pytest
from helm_chart import (
    CASES,
    CHART,
    Document,
    containers_of,
    documents,
    documents_of,
    environment_of,
    every_container,
    main_of,
    notes,
    of_kind,
    pod_of,
    render,
    rendered,
    values_of,
    volume_of,
    workloads,
)

# The oldest that Chart.yaml takes, and the newest whose schemas are at hand.
KUBERNETES: Final = ("1.27", kubernetes_validate.latest_version())
HOSPITAL: Final[dict[str, Any]] = {"enabled": True, "serverAddresses": ["https://a"], "clientId": "a"}
UNKNOWN_KINDS: Final = ("Certificate",)  # cert-manager's, whose schema is not Kubernetes'

# ---- what Kubernetes and Helm say ----------------------------------------------------------------------------------


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("case", CASES)
def test_every_object_is_one_that_kubernetes_knows(case: str, version: str) -> None:
    for document in documents(case):
        if document["kind"] in UNKNOWN_KINDS:
            continue
        kubernetes_validate.validate(document, version, strict=True)


def test_the_check_would_see_a_field_that_is_none() -> None:
    document = {**documents("coordinator")[0], "sepc": {}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(document, KUBERNETES[-1], strict=True)


@pytest.mark.parametrize("name", ["1234", "true", "0x1f", "1e3", "null"])
def test_names_that_look_like_something_else_stay_names(name: str) -> None:
    keys = {"gatewayKey": name, "mlflowKey": name, "namespace": name, "podLabels": {"app": name}}
    values = {
        "image": {"tag": name, "pullSecrets": [name]},
        "coordinator": {
            "name": name,
            "publicAddress": f"{name}:8443",
            "tls": {"existingSecret": name},
            "database": {"existingSecret": name, **keys},
            "admin": {"existingSecret": name, "key": name},
            "storage": {"storageClass": name, "gateway": {"size": "1234"}},
            "ingress": {"enabled": name != "1234", "className": name, "annotations": {"a": name}},
            "nodeSelector": {"a": name},
        },
        "site": {
            **HOSPITAL,
            "clientId": name,
            "joinToken": {"existingSecret": name, "key": name},
            "data": {"existingClaim": name, "subPath": name},
            "extraCa": {"existingConfigMap": name, "key": name},
            "httpsProxy": {"existingSecret": name, "key": name},
            "gpu": {"enabled": True, "runtimeClassName": name},
        },
    }
    for document in documents_of(render(values)):
        kubernetes_validate.validate(document, KUBERNETES[-1], strict=True)


@pytest.mark.parametrize("case", CASES)
def test_helms_own_lint_has_nothing_to_say(case: str) -> None:
    report = helm.lint(CHART, values_of(case), strict=True)
    assert report["errors"] == []
    assert [each["error"] for each in report["messages"]] in ([], ["icon is recommended"])


def test_the_parts_that_are_asked_for_are_made() -> None:
    coordinator = {"gateway", "fl-server", "mlflow", "proxy"}
    made = {case: set(workloads(case)) for case in CASES}
    assert made["coordinator"] == made["postgres"] == made["ingress"] == coordinator
    assert made["site"] == made["gpu"] == {"site"}
    assert made["both"] == coordinator | {"site"}
    assert made["own-tls"] == coordinator - {"mlflow"}
    assert made["tunnel"] == coordinator | {"tunnel"}


@pytest.mark.parametrize("case", CASES)
def test_rendering_twice_makes_the_same(case: str) -> None:
    assert render(values_of(case)) == rendered(case)


@pytest.mark.parametrize("case", CASES)
def test_names_are_unique_and_references_lead_somewhere(case: str) -> None:
    names = [(each["kind"], each["metadata"]["name"]) for each in documents(case)]
    assert len(names) == len(set(names))
    claims = {name for kind, name in names if kind == "PersistentVolumeClaim"} | {"scans"}
    for workload in workloads(case).values():
        pod = pod_of(workload)
        volumes = {each["name"]: each for each in pod["volumes"]}
        used = {mount["name"] for each in containers_of(workload) for mount in each["volumeMounts"]}
        assert used == set(volumes)
        claimed = [each["persistentVolumeClaim"] for each in volumes.values() if "persistentVolumeClaim" in each]
        assert {each["claimName"] for each in claimed} <= claims


@pytest.mark.parametrize("case", CASES)
def test_services_and_probes_find_their_ports(case: str) -> None:
    pods = {part: each["spec"]["template"] for part, each in workloads(case).items()}
    services = {each["metadata"]["name"]: each["spec"] for each in of_kind(case, "Service")}
    for workload in workloads(case).values():
        if workload["kind"] == "StatefulSet":
            assert workload["spec"]["serviceName"] in services
    for service in services.values():
        target = next(pod for pod in pods.values() if service["selector"].items() <= pod["metadata"]["labels"].items())
        ports = {port["name"] for port in target["spec"]["containers"][0].get("ports", [])}
        assert {port["targetPort"] for port in service.get("ports", [])} <= ports
    for pod in pods.values():
        container = pod["spec"]["containers"][0]
        ports = {port["name"] for port in container.get("ports", [])}
        probes = [
            container[f"{kind}Probe"] for kind in ("startup", "liveness", "readiness") if f"{kind}Probe" in container
        ]
        actions = [probe[kind] for probe in probes for kind in ("httpGet", "tcpSocket") if kind in probe]
        assert {action["port"] for action in actions} <= ports


@pytest.mark.parametrize("case", CASES)
def test_what_selects_pods_never_changes_with_the_release(case: str) -> None:
    for workload in workloads(case).values():
        selected = workload["spec"]["selector"]["matchLabels"]
        assert selected.keys() == {f"app.kubernetes.io/{key}" for key in ("name", "instance", "component")}
        assert selected.items() <= workload["spec"]["template"]["metadata"]["labels"].items()


# ---- rules for every container -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_every_pod_runs_as_nobody_in_particular(case: str) -> None:
    for workload in workloads(case).values():
        pod = pod_of(workload)
        assert pod["automountServiceAccountToken"] is False
        # Else the Service `mlflow` would make variables MLFLOW_..., which MLflow reads as settings.
        assert pod["enableServiceLinks"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC", "serviceAccountName"} & pod.keys()
        security = pod["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert security["runAsUser"] == security["runAsGroup"] == security["fsGroup"] == 10001


def test_every_container_is_locked_down_and_limited() -> None:
    for _, part, container in every_container():
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "runAsNonRoot": True,
            "capabilities": {"drop": ["ALL"]},
        }, part
        assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
        assert "memory" in container["resources"]["limits"]


@pytest.mark.parametrize("case", CASES)
def test_every_service_is_probed_and_has_a_place_for_temporary_files(case: str) -> None:
    for part, workload in workloads(case).items():
        container = main_of(workload)
        assert {"startupProbe", "livenessProbe", "readinessProbe"} <= container.keys(), part
        mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
        volume = volume_of(workload, mounts["/tmp"]["name"])  # noqa: S108 - a mount, not a file
        assert "sizeLimit" in volume["emptyDir"]


@pytest.mark.parametrize("case", CASES)
def test_there_is_one_of_each_and_never_two(case: str) -> None:
    for workload in workloads(case).values():
        assert workload["spec"]["replicas"] == 1
        if workload["kind"] == "Deployment":
            assert workload["spec"]["strategy"] == {"type": "Recreate"}


def test_images_have_a_tag_that_does_not_move() -> None:
    for case, _, container in every_container():
        registry, tag = ("registry.example.org/team/", "0.1.0-rc1") if case == "postgres" else ("", "0.1.0")
        assert re.fullmatch(rf"{registry}medhive/[a-z-]+:{tag}", container["image"]), container["image"]


def test_volumes_that_hold_keys_outlive_the_release() -> None:
    claims = [each for case in CASES for each in of_kind(case, "PersistentVolumeClaim")]
    assert claims
    assert {each["metadata"]["annotations"]["helm.sh/resource-policy"] for each in claims} == {"keep"}


# ---- secrets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_no_secret_is_made_or_written_down(case: str) -> None:
    assert of_kind(case, "Secret", "ConfigMap") == []
    for workload in workloads(case).values():
        for name, value in environment_of(workload).items():
            if re.search(r"PASSWORD|TOKEN|SECRET|KEY(?!_DAYS)|DATABASE_URL|_FILE$", name) and value is not None:
                assert value.startswith("/"), f"{name} holds a value, not the place of one"


def test_the_invite_comes_from_a_secret_that_may_go_later() -> None:
    env = {each["name"]: each for each in main_of(workloads("gpu")["site"])["env"]}
    reference = {"name": "invite", "key": "JOIN_TOKEN", "optional": True}
    assert env["JOIN_TOKEN"] == {"name": "JOIN_TOKEN", "valueFrom": {"secretKeyRef": reference}}


def test_the_default_values_name_no_secret() -> None:
    with helm.Chart.load(CHART) as chart:
        values = chart.values
    places = (
        values["coordinator"]["tls"],
        values["coordinator"]["database"],
        values["coordinator"]["admin"],
        values["coordinator"]["tunnel"],
    )
    assert {place["existingSecret"] for place in (*places, values["site"]["joinToken"], values["site"]["pacs"])} == {""}


@pytest.mark.parametrize("case", ["coordinator", "both", "postgres", "own-tls"])
def test_each_service_sees_its_own_handout_alone_and_cannot_change_it(case: str) -> None:
    for part in workloads(case).keys() - {"gateway", "site"}:
        for container in containers_of(workloads(case)[part]):
            mounts = [mount for mount in container["volumeMounts"] if mount["name"] == "handouts"]
            assert [(mount["subPath"], mount["readOnly"]) for mount in mounts] == [(part, True)]
    gateway = main_of(workloads(case)["gateway"])
    served = {mount["subPath"]: mount["mountPath"] for mount in gateway["volumeMounts"] if mount["name"] == "handouts"}
    folder = environment_of(workloads(case)["gateway"])["MEDHIVE_GATEWAY_HANDOUT_DIR"]
    assert served == {part: f"{folder}/{part}" for part in workloads(case).keys() - {"gateway", "site"}}


# ---- single settings -----------------------------------------------------------------------------------------------


def test_shared_volumes_keep_the_pods_together_only_where_they_must() -> None:
    for part in ("fl-server", "mlflow", "proxy"):
        affinity = pod_of(workloads("coordinator")[part])["affinity"]["podAffinity"]
        (required,) = affinity["requiredDuringSchedulingIgnoredDuringExecution"]
        assert required["labelSelector"]["matchLabels"]["app.kubernetes.io/component"] == "gateway"
    assert not [part for part, each in workloads("postgres").items() if "affinity" in pod_of(each)]
    claims = {each["metadata"]["name"]: each["spec"] for each in of_kind("postgres", "PersistentVolumeClaim")}
    shared = {name for name, claim in claims.items() if claim["accessModes"] == ["ReadWriteMany"]}
    assert shared == {"trial-medhive-blobs", "trial-medhive-handouts"}
    assert {claim["storageClassName"] for claim in claims.values()} == {"fast"}


def test_postgresqls_urls_are_files_of_the_named_secret() -> None:
    for part, key in (("gateway", "gateway-url"), ("mlflow", "mlflow-url")):
        workload = workloads("postgres")[part]
        volume = volume_of(workload, "database")
        assert volume["secret"]["secretName"] == "databases"
        assert volume["secret"]["items"] == [{"key": key, "path": "url"}]
        assert "/database/url" in environment_of(workload).values()


def test_a_gpu_is_a_limit_beside_the_others() -> None:
    pod = pod_of(workloads("gpu")["site"])
    assert pod["runtimeClassName"] == "nvidia"
    assert pod["containers"][0]["resources"]["limits"] == {"memory": "32Gi", "nvidia.com/gpu": "2"}
    assert "runtimeClassName" not in pod_of(workloads("site")["site"])
    assert "nvidia.com/gpu" not in main_of(workloads("site")["site"])["resources"]["limits"]


def test_the_pacs_login_is_a_file_of_the_named_secret() -> None:
    for case, key in (("pacs", "password"), ("gpu", "token")):
        site = workloads(case)["site"]
        secret = volume_of(site, "pacs-login")["secret"]
        assert (secret["secretName"], secret["items"]) == ("pacs-login", [{"key": key, "path": "login"}])
        mounts = {mount["name"]: mount for mount in main_of(site)["volumeMounts"]}
        assert mounts["pacs-login"]["readOnly"] is True
        # A file that is mounted by its path alone would not follow a token that is renewed.
        assert "subPath" not in mounts["pacs-login"]
        assert "/pacs-login/login" in environment_of(site).values()
    assert not [name for name in environment_of(workloads("site")["site"]) if name.startswith("PACS")]


@pytest.mark.parametrize("case", ["site", "both", "gpu"])
def test_the_hospitals_data_cannot_be_written(case: str) -> None:
    pod = pod_of(workloads(case)["site"])
    mount = next(each for each in pod["containers"][0]["volumeMounts"] if each["mountPath"] == "/data")
    assert mount["readOnly"] is True
    volume = next(each for each in pod["volumes"] if each["name"] == mount["name"])
    assert volume.get("persistentVolumeClaim", {"readOnly": True})["readOnly"] is True


def test_an_own_certificate_is_shown_by_the_proxy() -> None:
    for case, secret in (("own-tls", "public-certificate"), ("ingress", "trial-medhive-public-tls")):
        proxy = workloads(case)["proxy"]
        volume = volume_of(proxy, "tls")
        assert volume["secret"]["secretName"] == secret
        assert environment_of(proxy)["TLS_CERT_FILE"] == "/tls/tls.crt"
        gateway = workloads(case)["gateway"]
        assert environment_of(gateway)["MEDHIVE_GATEWAY_OWN_CERT_FILE"] == "/own-tls/tls.crt"
        seen = volume_of(gateway, "own-tls")["secret"]
        assert seen["secretName"] == secret and [item["key"] for item in seen["items"]] == ["tls.crt"]
    assert "TLS_CERT_FILE" not in environment_of(workloads("coordinator")["proxy"])


def test_cert_manager_is_asked_for_the_public_name() -> None:
    (certificate,) = of_kind("ingress", "Certificate")
    assert certificate["apiVersion"] == "cert-manager.io/v1"
    assert certificate["spec"]["dnsNames"] == ["medhive.example.org"]
    assert certificate["spec"]["issuerRef"] == {
        "name": "letsencrypt",
        "kind": "ClusterIssuer",
        "group": "cert-manager.io",
    }


def test_an_ingress_leaves_tls_to_the_proxy() -> None:
    (ingress,) = of_kind("ingress", "Ingress")
    assert ingress["metadata"]["annotations"]["nginx.ingress.kubernetes.io/ssl-passthrough"] == "true"
    assert "tls" not in ingress["spec"]
    assert ingress["spec"]["rules"][0]["host"] == "medhive.example.org"
    assert [each for case in set(CASES) - {"ingress"} for each in of_kind(case, "Ingress")] == []


def test_only_the_proxy_is_published() -> None:
    for case in CASES:
        types = {each["metadata"]["name"]: each["spec"].get("type", "ClusterIP") for each in of_kind(case, "Service")}
        assert {name for name, kind in types.items() if kind != "ClusterIP"} <= {"proxy"}
    (proxy,) = [each for each in of_kind("both", "Service") if each["metadata"]["name"] == "proxy"]
    assert proxy["spec"]["ports"][0]["nodePort"] == 30443


# ---- wrong values --------------------------------------------------------------------------------------------------


def site(**settings: Any) -> dict[str, Any]:
    """Values of a hospital alone, which lack its data."""
    return {"coordinator": {"enabled": False}, "site": {**HOSPITAL, **settings}}


def archive(**settings: Any) -> dict[str, Any]:
    """Values of a hospital with a PACS, but for these of its settings."""
    values = values_of("pacs")
    return {**values, "site": {**values["site"], "pacs": {**values["site"]["pacs"], **settings}}}


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"cordinator": {"enabled": True}}, "cordinator"),
        ({"coordinator": {"publicAdress": "a:1"}}, "publicAdress"),
        ({"coordinator": {"gateway": {"password": "x"}}}, "password"),
        ({"coordinator": {"publicAddress": "medhive.example.org"}}, "publicAddress"),
        ({"coordinator": {"publicAddress": "https://medhive.example.org:8443"}}, "publicAddress"),
        ({"coordinator": {"name": ""}}, "name"),
        ({"coordinator": {"service": {"type": "ExternalName"}}}, "type"),
        ({"coordinator": {"service": {"port": 0}}}, "port"),
        ({"coordinator": {"server": {"maxRuns": 0}}}, "maxRuns"),
        ({"coordinator": {"storage": {"accessMode": "ReadOnlyMany"}}}, "accessMode"),
        ({"coordinator": {"storage": {"blobs": {"size": "a lot"}}}}, "size"),
        ({"coordinator": {"gateway": {"trustedProxies": ["the proxy"]}}}, "trustedProxies"),
        ({"image": {"tag": "latest"}}, "tag"),
        ({"image": {"pullPolicy": "Sometimes"}}, "pullPolicy"),
        ({"networkPolicies": {"enabled": "yes"}}, "enabled"),
        ({"networkPolicies": {"dns": {"cidrs": ["169.254.20.10"]}}}, "cidrs"),
        ({"site": {"serverAddresses": ["http://medhive.example.org"]}}, "serverAddresses"),
        ({"site": {"joinToken": {"value": "mh2.x"}}}, "value"),
        ({"site": {"data": {"hostPath": "scans"}}}, "hostPath"),
        ({"coordinator": {"renewal": {"certificateDays": 900}}}, "certificateDays"),
        ({"coordinator": {"tunnel": {"authtoken": "secret"}}}, "authtoken"),
        ({"coordinator": {"tunnel": {"protocol": "tcp"}}}, "protocol"),
        ({"site": {"gpu": {"count": 0}}}, "count"),
        ({"site": {"httpsProxy": {"url": "http://user:password@proxy:3128"}}}, "httpsProxy"),
        ({"site": {"egressPorts": []}}, "egressPorts"),
        ({"site": {"pacs": {"url": "http://pacs.example/dicom-web"}}}, "url"),
        ({"site": {"pacs": {"url": "https://medhive:secret@pacs.example/"}}}, "url"),
        ({"site": {"pacs": {"password": "secret"}}}, "password"),
        ({"site": {"resources": {"limit": {"memory": "1Gi"}}}}, "limit"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_by_its_name(wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(helm.HelmValuesError, match=named):
        render(wrong)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({}, "coordinator.publicAddress is required"),
        ({"coordinator": {"publicAddress": "a:1", "database": {"existingSecret": "db"}}}, "Say where PostgreSQL is"),
        ({"coordinator": {"publicAddress": "203.0.113.7:443", "ingress": {"enabled": True}}}, "must begin with a name"),
        (
            {"coordinator": {"publicAddress": "a:1", "tls": {"certManager": {"enabled": True}}}},
            "issuerRef.name is required",
        ),
        (
            {"coordinator": {"publicAddress": "a:1", "tls": {"existingSecret": "b", "certManager": {"enabled": True}}}},
            "not both",
        ),
        ({"coordinator": {"publicAddress": "a:1", "tunnel": {"enabled": True}}}, "the Secret that holds ngrok's token"),
        ({"coordinator": {"publicAddress": "a:1", "renewal": {"caDays": 700}}}, "caOverlapDays is more than a quarter"),
        ({"coordinator": {"enabled": False}, "site": {"enabled": True}}, "site.serverAddresses is required"),
        (site(clientId=""), "site.clientId is required"),
        (site(), "Set one of site.data.existingClaim and site.data.hostPath"),
        (site(data={"existingClaim": "a", "hostPath": "/b"}), "Set one of"),
        (archive(namespace=""), "Say where the PACS is"),
        (archive(podLabels={}), "Say where the PACS is"),
        (archive(tokenKey="token"), "not both"),
        (archive(existingSecret=""), "goes with one of"),
        (archive(passwordKey=""), "goes with one of"),
        (archive(user=""), "go together"),
    ],
)
def test_what_is_missing_is_said_in_one_sentence(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(helm.HelmRenderError, match=said):
        render(wrong)


def test_the_schema_and_the_values_have_the_same_keys() -> None:
    with helm.Chart.load(CHART) as chart:
        schema, values = chart.schema, chart.values
    assert schema
    definitions = schema["definitions"]

    def compare(rules: Document, given: Any, path: str) -> None:
        rules = definitions[rules["$ref"].rpartition("/")[2]] if "$ref" in rules else rules
        if "properties" not in rules or path.endswith(".resources"):
            return
        assert rules["additionalProperties"] is False, path
        assert rules["properties"].keys() - {"global"} == given.keys(), path
        for key, rule in rules["properties"].items():
            if key in given:
                compare(rule, given[key], f"{path}.{key}")

    compare(schema, values, "")


# ---- what people are told ------------------------------------------------------------------------------------------


def test_the_notes_say_how_to_log_in() -> None:
    assert 'logs statefulset/trial-medhive-gateway --container gateway | grep "admin password"' in notes("coordinator")
    assert "medhive-admin login https://medhive.example.org:8443 --username admin --ca-file ca.crt" in notes(
        "coordinator"
    )
    assert "the password of the Secret first-admin" in notes("postgres")
    assert "admin" not in notes("site")
    assert "Secret invite may be deleted" in notes("site")
