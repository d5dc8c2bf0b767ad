# Step 2, for one method setting: thresholds from the histograms.
rule thresholds:
    input:
        rules.calibrate.output,
    output:
        f"{RESULTS}/{{model}}/{{run}}/{{label}}/thresholds.parquet",
    log:
        f"{RESULTS}/logs/thresholds/{{model}}/{{run}}/{{label}}.log",
    benchmark:
        f"{RESULTS}/logs/thresholds/{{model}}/{{run}}/{{label}}.bench.tsv"
    conda:
        "../envs/generate.yaml"
    resources:
        mem_mb=1000,
        runtime=10,
    params:
        method=lambda wildcards: method_options(
            STUDY.setting(wildcards.run, wildcards.label)
        ),
        source=source_hash("thresholds"),
    message:
        "Thresholds of {wildcards.model} under {wildcards.label}"
    shell:
        "sparsetrace thresholds {input:q} {params.method} --out {output:q} > {log:q} 2>&1"
