{{/* Names, labels and what every pod and container has in common. */}}

{{- define "medhive.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* What selects a part's pods: (dict "root" $ "part" "gateway"). Never changes between releases. */}}
{{- define "medhive.selector" -}}
app.kubernetes.io/name: medhive
app.kubernetes.io/instance: {{ .root.Release.Name | quote }}
app.kubernetes.io/component: {{ .part }}
{{- end -}}

{{- define "medhive.labels" -}}
{{ include "medhive.selector" . }}
app.kubernetes.io/part-of: medhive
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- end -}}

{{/* (dict "root" $ "image" "fl-server") */}}
{{- define "medhive.image" -}}
{{- $image := .root.Values.image -}}
{{- with $image.registry }}{{ trimSuffix "/" . }}/{{ end -}}
medhive/{{ .image }}:{{ default .root.Chart.AppVersion $image.tag }}
{{- end -}}

{{/* The public address's two halves. */}}
{{- define "medhive.publicHost" -}}
{{- regexReplaceAll ":[0-9]+$" .Values.coordinator.publicAddress "" | trimPrefix "[" | trimSuffix "]" -}}
{{- end -}}

{{/* The Secret whose certificate the proxy shows, or nothing. */}}
{{- define "medhive.tlsSecret" -}}
{{- $tls := .Values.coordinator.tls -}}
{{- if $tls.certManager.enabled -}}
{{ include "medhive.fullname" . }}-public-tls
{{- else -}}
{{ $tls.existingSecret }}
{{- end -}}
{{- end -}}

{{/*
The images run as this user. Volumes get its group, because their roots belong to root: so services keep their state in a
folder below the root of the volume, which they make themselves and can therefore close to everybody else.
Service links are off: of the Service `mlflow` they would make variables MLFLOW_..., which MLflow takes for its settings.
*/}}
{{- define "medhive.podSecurity" -}}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  {{- with .groups }}
  supplementalGroups:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  seccompProfile:
    type: RuntimeDefault
{{- end -}}

{{- define "medhive.containerSecurity" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  runAsNonRoot: true
  capabilities:
    drop: [ALL]
{{- end -}}

{{- define "medhive.pullSecrets" -}}
{{- with .Values.image.pullSecrets -}}
imagePullSecrets:
{{- range . }}
  - name: {{ . | quote }}
{{- end }}
{{- end -}}
{{- end -}}

{{/* Where pods may run: the values of the coordinator or of the site. */}}
{{- define "medhive.placement" -}}
{{- $place := dict -}}
{{- with .nodeSelector }}{{ $_ := set $place "nodeSelector" . }}{{ end -}}
{{- with .tolerations }}{{ $_ := set $place "tolerations" . }}{{ end -}}
{{- with $place }}{{ toYaml . }}{{ end -}}
{{- end -}}

{{/*
With ReadWriteOnce the coordinator's pods share volumes, and so a node: all go where the gateway is, and the gateway goes
back to where the others are.
*/}}
{{- define "medhive.besideGateway" -}}
{{- if eq .Values.coordinator.storage.accessMode "ReadWriteOnce" -}}
affinity:
  podAffinity:
    requiredDuringSchedulingIgnoredDuringExecution:
      - topologyKey: kubernetes.io/hostname
        labelSelector:
          matchLabels:
            {{- include "medhive.selector" (dict "root" . "part" "gateway") | nindent 12 }}
{{- end }}
{{- end -}}

{{- define "medhive.nearOthers" -}}
{{- if eq .Values.coordinator.storage.accessMode "ReadWriteOnce" -}}
affinity:
  podAffinity:
    preferredDuringSchedulingIgnoredDuringExecution:
      - weight: 100
        podAffinityTerm:
          topologyKey: kubernetes.io/hostname
          labelSelector:
            matchLabels:
              app.kubernetes.io/name: medhive
              app.kubernetes.io/instance: {{ .Release.Name | quote }}
            matchExpressions:
              - {key: app.kubernetes.io/component, operator: In, values: [fl-server, mlflow, proxy]}
{{- end }}
{{- end -}}

{{/*
Waits for what the gateway hands out, so that a first start is a quiet wait and no row of crashes:
(dict "root" $ "image" "fl-server" "files" (list "ca.crt")).
*/}}
{{- define "medhive.waitForHandout" -}}
- name: wait-for-gateway
  image: {{ include "medhive.image" . | quote }}
  imagePullPolicy: {{ .root.Values.image.pullPolicy }}
  command:
    - /bin/sh
    - -c
    - |
      for file in {{ join " " .files }}; do
        until [ -s "/handout/$file" ]; do sleep 1; done
      done
  {{- include "medhive.containerSecurity" . | nindent 2 }}
  resources:
    requests: {cpu: 10m, memory: 16Mi}
    limits: {memory: 64Mi}
  volumeMounts:
    - {name: handouts, mountPath: /handout, subPath: {{ .image }}, readOnly: true}
{{- end -}}

{{/* A claim: (dict "root" $ "part" "gateway" "name" "gateway" "size" "1Gi" "class" "" "mode" "ReadWriteOnce") */}}
{{- define "medhive.claim" -}}
apiVersion: v1
kind: PersistentVolumeClaim
metadata:
  name: {{ include "medhive.fullname" .root }}-{{ .name }}
  labels:
    {{- include "medhive.labels" . | nindent 4 }}
  annotations:
    helm.sh/resource-policy: keep
spec:
  accessModes: [{{ .mode }}]
  {{- with .class }}
  storageClassName: {{ . | quote }}
  {{- end }}
  resources:
    requests:
      storage: {{ .size | quote }}
{{- end -}}

{{/* The name service, to which a pod may speak. */}}
{{- define "medhive.dnsEgress" -}}
- to:
    - namespaceSelector:
        matchLabels:
          kubernetes.io/metadata.name: {{ .Values.networkPolicies.dns.namespace | quote }}
      podSelector:
        matchLabels:
          {{- toYaml (default (dict "k8s-app" "kube-dns") .Values.networkPolicies.dns.podLabels) | nindent 10 }}
    {{- range .Values.networkPolicies.dns.cidrs }}
    - ipBlock:
        cidr: {{ . | quote }}
    {{- end }}
  ports:
    - {protocol: UDP, port: 53}
    - {protocol: TCP, port: 53}
{{- end -}}

{{/* A server wherever the values say that it is: `.cidrs`, `.namespace` with `.podLabels`, `.port`. */}}
{{- define "medhive.serverEgress" -}}
- to:
    {{- range .cidrs }}
    - ipBlock:
        cidr: {{ . | quote }}
    {{- end }}
    {{- if .namespace }}
    - namespaceSelector:
        matchLabels:
          kubernetes.io/metadata.name: {{ .namespace | quote }}
      podSelector:
        matchLabels:
          {{- toYaml .podLabels | nindent 10 }}
    {{- end }}
  ports:
    - {protocol: TCP, port: {{ .port }}}
{{- end -}}

{{- /* The pods that may read figures, as a peer of a network policy; nothing where none are named. */}}
{{- define "medhive.fromPrometheus" -}}
{{- $prometheus := .Values.networkPolicies.prometheus }}
{{- if and $prometheus.namespace $prometheus.podLabels -}}
- namespaceSelector:
    matchLabels:
      kubernetes.io/metadata.name: {{ $prometheus.namespace | quote }}
  podSelector:
    matchLabels:
      {{- toYaml $prometheus.podLabels | nindent 6 }}
{{- end }}
{{- end }}
