{{- define "rushes.name" -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "rushes.labels" -}}
app.kubernetes.io/name: rushes
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}

{{- define "rushes.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: {{ .Values.podSecurity.runAsUser }}
runAsGroup: {{ .Values.podSecurity.runAsUser }}
fsGroup: {{ .Values.podSecurity.fsGroup }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "rushes.securityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities:
  drop: [ALL]
{{- end -}}

{{- /* Seconds after which a pod is killed: longer than what it may still finish, for the drain before it. */ -}}
{{- define "rushes.grace" -}}
{{- add .Values.config.graceful_shutdown_seconds 60 -}}
{{- end -}}

{{- define "rushes.environment" -}}
- {name: HOME, value: /tmp}
- {name: RAY_USAGE_STATS_ENABLED, value: "0"}
# Log lines of replicas to the pod's own output.
- {name: RAY_LOG_TO_STDERR, value: "1"}
- {name: RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S, value: {{ include "rushes.grace" . | quote }}}
# How soon a change of load is known to the controller; 10 s by default.
- {name: RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S, value: "2"}
- {name: RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S, value: "2"}
{{- end -}}

{{- define "rushes.environmentFrom" -}}
{{- with .Values.secrets.environment }}
envFrom:
  - secretRef: {name: {{ . }}}
{{- end }}
{{- end -}}

{{- define "rushes.mounts" -}}
- {name: scratch, mountPath: /tmp}
- {name: shared-memory, mountPath: /dev/shm}
{{- if .Values.storage.bundles.existingClaim }}
- {name: bundles, mountPath: /bundles, readOnly: true}
{{- end }}
{{- if .Values.storage.engines.existingClaim }}
- {name: engines, mountPath: /engines, readOnly: true}
{{- end }}
{{- end -}}

{{- define "rushes.volumes" -}}
- name: scratch
  emptyDir: {sizeLimit: {{ .Values.scratchSize }}}
- name: shared-memory
  emptyDir: {medium: Memory, sizeLimit: {{ .Values.sharedMemory }}}
{{- with .Values.storage.bundles.existingClaim }}
- name: bundles
  persistentVolumeClaim: {claimName: {{ . }}, readOnly: true}
{{- end }}
{{- with .Values.storage.engines.existingClaim }}
- name: engines
  persistentVolumeClaim: {claimName: {{ . }}}
{{- end }}
{{- end -}}

{{- define "rushes.resources" -}}
limits:
  cpu: {{ .cpu | quote }}
  memory: {{ .memory }}
  {{- with .gpus }}
  nvidia.com/gpu: {{ . }}
  {{- end }}
requests:
  cpu: {{ .cpu | quote }}
  memory: {{ .memory }}
  {{- with .gpus }}
  nvidia.com/gpu: {{ . }}
  {{- end }}
{{- end -}}

{{- /* The service's configuration, with each stage sent to the group that is for it. */ -}}
{{- define "rushes.config" -}}
{{- $config := deepCopy .Values.config -}}
{{- range .Values.groups -}}
{{- with .stage -}}
{{- $selector := dict "label_selector" (dict "rushes.dev/stage" .) -}}
{{- range (ternary (list "api" "runner") (list .) (eq . "front")) -}}
{{- $_ := set $config . (merge (deepCopy (get $config . | default dict)) $selector) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- toYaml $config -}}
{{- end -}}

{{- define "rushes.serveConfig" -}}
proxy_location: EveryNode
http_options:
  host: 0.0.0.0
  port: 8000
logging_config:
  encoding: JSON
  log_level: WARNING
  enable_access_log: false
applications:
  - name: rushes
    route_prefix: /
    import_path: serving.deployments.app:build_app
    {{- if .Values.autoscaling.policy }}
    autoscaling_policy:
      policy_function: serving.deployments.scaling:VideoPolicy
      policy_kwargs:
        target_seconds: {{ .Values.autoscaling.targetSeconds }}
        cold_start_seconds: {{ .Values.autoscaling.coldStartSeconds }}
    {{- end }}
    args:
      {{- include "rushes.config" . | nindent 6 }}
{{- end -}}
