# What the dense model makes of the held-out text of a model, once for all settings.
rule quality_dense:
    input:
        model=lambda wildcards: STUDY.runtime_model(wildcards.model),
        text=lambda wildcards: STUDY.quality_text(wildcards.model) or [],
    output:
        f"{RESULTS}/{{model}}/quality_dense.safetensors",
    log:
        f"{RESULTS}/logs/quality_dense/{{model}}.log",
    benchmark:
        f"{RESULTS}/logs/quality_dense/{{model}}.bench.tsv"
    conda:
        "../envs/generate.yaml"
    threads: STUDY.machine.threads
    resources:
        gpu=STUDY.gpus,
        mem_mb=lambda wildcards, input, attempt: STUDY.needs(
            "quality", wildcards.model, input.model, attempt
        ).mem_mb,
        runtime=lambda wildcards, input, attempt: STUDY.needs(
            "quality", wildcards.model, input.model, attempt
        ).runtime,
    params:
        options=lambda wildcards: options(STUDY.models[wildcards.model].quality),
        machine=options(STUDY.machine),
        source=source_hash("calibration.dense_states"),
    message:
        "Quality of the dense {wildcards.model}"
    shell:
        "sparsetrace quality-dense {input.model:q} --text {input.text:q} --out {output:q}"
        " {params.options} {params.machine} > {log:q} 2>&1"


# What a method setting costs in quality, beside its workload; only for models that name a held-out text.
rule quality:
    input:
        model=lambda wildcards: STUDY.runtime_model(wildcards.model),
        thresholds=rules.thresholds.output[0],
        dense=rules.quality_dense.output[0],
        text=lambda wildcards: STUDY.quality_text(wildcards.model) or [],
    output:
        f"{RESULTS}/{{model}}/{{run}}/{{label}}/quality.parquet",
    log:
        f"{RESULTS}/logs/quality/{{model}}/{{run}}/{{label}}.log",
    benchmark:
        f"{RESULTS}/logs/quality/{{model}}/{{run}}/{{label}}.bench.tsv"
    conda:
        "../envs/generate.yaml"
    threads: STUDY.machine.threads
    resources:
        gpu=STUDY.gpus,
        mem_mb=lambda wildcards, input, attempt: STUDY.needs(
            "quality", wildcards.model, input.model, attempt
        ).mem_mb,
        runtime=lambda wildcards, input, attempt: STUDY.needs(
            "quality", wildcards.model, input.model, attempt
        ).runtime,
    params:
        options=lambda wildcards: options(STUDY.models[wildcards.model].quality),
        machine=options(STUDY.machine),
        source=source_hash("calibration.quality"),
    message:
        "Quality of {wildcards.model} under {wildcards.label}"
    shell:
        "sparsetrace quality {input.model:q} --thresholds {input.thresholds:q} --text {input.text:q}"
        " --dense {input.dense:q} --out {output:q} {params.options} {params.machine} > {log:q} 2>&1"
