//! What each part of the system brings: FM and expert as they are, and the same without one part.
//!
//! An arm has an [`InputMask`] or a setting that leaves a part out. If the FM lacks the part, too,
//! the arm has an FM of its own, which follows the same stream; if only the expert lacks it, the
//! part is hidden in the first FM's log. A part of an expert's network cannot be hidden from
//! outside: for that, components that lack it are arms, too.

use std::collections::BTreeMap;

use hypercast_config::Config;
use hypercast_data::schema::{MainTasks, Schema};
use hypercast_expert::Blueprint;
use hypercast_fm::spec::{FmConfig, FmSpec};
use hypercast_train::{fm::dataset_spec, report::ALL};
use serde_json::json;

use super::{
    ExperimentContext, ExperimentReport, component,
    mask::{HistoryMask, InputMask, TaeMask},
    report::arms_by_task,
    runner::{ArmRunner, ExperimentArm},
    transfer::FmHeads,
};
use crate::{
    error::{CommonErrors as _, Error, Result},
    evaluate::stream::StreamBatch,
    tally::ScoreTally,
};

/// An FM, and the inputs that are hidden from it.
#[derive(Clone)]
struct AblatedFm {
    name: String,
    config: FmConfig,
    spec: FmSpec,
    mask: InputMask,
}

/// An expert, and the inputs that are hidden from it.
#[derive(Clone)]
struct AblatedExpert {
    name: String,
    /// The component's name.
    plugin: String,
    /// The place of the FM whose log it learns from.
    fm: usize,
    mask: InputMask,
    /// No answer of the FM at all: neither embeddings nor predictions.
    without_fm: bool,
    without_fm_logits: bool,
}

/// All arms; the first of each is the whole system.
struct AblationPlan {
    fms: Vec<AblatedFm>,
    experts: Vec<AblatedExpert>,
    /// The parts that have no arm, since this expert or data set lacks them, each with the reason.
    left_out: BTreeMap<&'static str, &'static str>,
}

/// Runs it for every seed.
pub fn run(context: &ExperimentContext<'_>) -> Result<ExperimentReport> {
    let plan = AblationPlan::new(context)?;
    let fm_names: Vec<&str> = plan.fms.iter().map(|fm| fm.name.as_str()).collect();
    let expert_names: Vec<&str> = plan.experts.iter().map(|arm| arm.name.as_str()).collect();
    let mut of_fms = Vec::new();
    let of_experts = context.tallies(&expert_names, |config, tally| {
        let from_ms = context.window.report_from_ms;
        let mut heads = ScoreTally::new(&context.labels, from_ms, &fm_names);
        context.times.time("fm", || embed(context, config, &plan, &mut heads))?;
        of_fms.push(heads);
        plan.experts
            .iter()
            .enumerate()
            .try_for_each(|(index, arm)| arm.run(context, config, index, tally))
    })?;
    let (experts, fms) = (context.rows(&of_experts, None)?, context.rows(&of_fms, None)?);
    let left_out = plan.left_out.iter().map(|(part, why)| format!("left out: {part}: {why}\n"));
    let tables = [arms_by_task(&experts, ALL), arms_by_task(&fms, ALL)].join("\n");
    let table = tables + "\n" + &left_out.collect::<String>();
    let chosen = json!({ "left_out": plan.left_out, "variants": context.options.variant });
    Ok(context.report(table, [experts, fms].concat(), Vec::new(), chosen))
}

/// Runs all FMs over one stream, logs what they answer, and tallies their heads' predictions.
fn embed(
    context: &ExperimentContext<'_>,
    config: &Config,
    plan: &AblationPlan,
    tally: &mut ScoreTally,
) -> Result<()> {
    let open = |(at, fm): (usize, &AblatedFm)| {
        let own = FmConfig { seed: config.fm.seed, ..fm.config.clone() };
        context.fm(config, &format!("fm-{at}"), &own, &fm.spec)
    };
    let mut trainers = plan.fms.iter().enumerate().map(open).collect::<Result<Vec<_>>>()?;
    let widths = vec![config.fm.tae_width(); plan.fms.len()];
    let heads: Vec<FmHeads> =
        plan.fms.iter().map(|fm| FmHeads::new(&fm.spec.tasks, context)).collect();
    let main_tasks = MainTasks::new(&context.dataset.schema);
    // What is left out of a history makes room for what came before it.
    let stream = context.stream(config, config.features.history_events.max(config.fm.max_history));
    stream.log("FMs", &widths, None, |part, _| {
        let mut said = Vec::new();
        for (at, (fm, trainer)) in plan.fms.iter().zip(&mut trainers).enumerate() {
            let hidden = fm.mask.hidden(part.examples);
            let part = StreamBatch { examples: &hidden, ..*part };
            let output = part.through(trainer.as_mut(), &|_| true)?;
            if !part.history_only {
                heads[at].tally(&part, at, &output.predictions, tally);
            }
            said.push(main_tasks.output(&fm.spec, output.served(&fm.spec)));
        }
        Ok(said)
    })
}

impl AblatedExpert {
    /// Trains and measures it.
    fn run(
        &self,
        context: &ExperimentContext<'_>,
        config: &Config,
        index: usize,
        tally: &mut ScoreTally,
    ) -> Result<()> {
        let plugin = component(context.options, &self.plugin);
        let runner =
            ArmRunner { plugin, mask: self.mask.clone(), ..context.runner(config, self.fm)? };
        let arm = ExperimentArm {
            index,
            embedding: 0..runner.log.tae_dim,
            without_tae: self.without_fm,
            with_fm_logits: !self.without_fm_logits,
        };
        runner.run(&arm, &runner.surfaces(), tally)?;
        Ok(())
    }
}

impl AblationPlan {
    /// The arms that there are for an expert and a data set.
    fn new(context: &ExperimentContext<'_>) -> Result<Self> {
        let fm = AblatedFm {
            name: "FM".into(),
            config: context.config.fm.clone(),
            spec: dataset_spec(context.dataset)?,
            mask: InputMask::default(),
        };
        let whole = AblatedExpert {
            name: "whole".into(),
            plugin: context.options.expert.clone(),
            fm: 0,
            mask: InputMask::default(),
            without_fm: false,
            without_fm_logits: false,
        };
        let mut plan = Self { fms: vec![fm], experts: vec![whole], left_out: BTreeMap::default() };
        plan.add_fms(context);
        plan.add_experts(&context.blueprint(&context.plugin)?);
        for name in &context.options.variant {
            if plan.experts.iter().any(|arm| arm.name == *name) {
                return Err(Error::invalid(format!(
                    "--variant {name}: there is an arm of this name already"
                )));
            }
            // One that is missing or refused is reported here, before any FM is trained.
            context.blueprint(&component(context.options, name))?;
            let (name, plugin) = (name.clone(), name.clone());
            plan.experts.push(AblatedExpert { name, plugin, ..plan.experts[0].clone() });
        }
        if context.options.variant.is_empty() {
            plan.left_out.insert(
                "parts of the expert's network, such as a cross network",
                "no component without one was given (--variant)",
            );
        }
        Ok(plan)
    }

    /// Adds arms without an input of the FM. All but its candidate columns are hidden from the
    /// expert, too.
    fn add_fms(&mut self, context: &ExperimentContext<'_>) {
        let whole = self.fms[0].clone();
        let shown = InputMask::default();
        if whole.config.candidate_columns {
            let config = FmConfig { candidate_columns: false, ..whole.config.clone() };
            self.add_fm(
                "the FM's candidate columns",
                AblatedFm { config, ..whole.clone() },
                &shown,
            );
        } else {
            self.left_out.insert("the FM's candidate columns", "fm.candidate_columns is false");
        }
        if whole.spec.content > 0 {
            let spec = FmSpec { content: 0, ..whole.spec.clone() };
            let hidden = InputMask { content: true, ..shown.clone() };
            self.add_fm("content vectors", AblatedFm { spec, ..whole.clone() }, &hidden);
        } else {
            self.left_out.insert("content vectors", "the data set has none");
        }
        let mask = InputMask { history: HistoryMask::Negatives, ..shown.clone() };
        let hidden = mask.clone();
        self.add_fm("negatives in histories", AblatedFm { mask, ..whole.clone() }, &hidden);
        let features = effect_columns(&context.dataset.schema);
        if features.is_empty() {
            self.left_out.insert("effects of counters", "the schema has no counter with effects");
        } else {
            let mask = InputMask { features, ..shown };
            let hidden = mask.clone();
            self.add_fm("effects of counters", AblatedFm { mask, ..whole }, &hidden);
        }
    }

    fn add_fm(&mut self, part: &str, fm: AblatedFm, hidden_of_expert: &InputMask) {
        let own = part.strip_prefix("the FM's ").unwrap_or(part);
        let arm = AblatedExpert {
            name: format!("without {part}"),
            fm: self.fms.len(),
            mask: hidden_of_expert.clone(),
            ..self.experts[0].clone()
        };
        self.fms.push(AblatedFm { name: format!("FM without {own}"), ..fm });
        self.experts.push(arm);
    }

    /// Adds arms without an input of the expert alone.
    fn add_experts(&mut self, blueprint: &Blueprint) {
        let whole = self.experts[0].clone();
        let named = |part: &str| AblatedExpert { name: format!("without {part}"), ..whole.clone() };
        let masked = |part: &str, mask| AblatedExpert { mask, ..named(part) };
        let reads_tae = blueprint.columns.reads_tae();
        let reads_logits = blueprint.columns.reads_fm_logits();
        if reads_tae {
            let mask = InputMask { tae: TaeMask::Values, ..InputMask::default() };
            self.experts.push(masked("TAE", mask));
        } else {
            self.left_out.insert("TAE", "the expert does not read it");
        }
        if reads_logits {
            self.experts.push(AblatedExpert { without_fm_logits: true, ..named("FM logits") });
        } else {
            self.left_out.insert("FM logits", "the expert does not read them");
        }
        if reads_tae && reads_logits {
            self.experts.push(AblatedExpert { without_fm: true, ..named("TAE and FM logits") });
        }
        if blueprint.description.history_len > 0 {
            let mask = InputMask { history: HistoryMask::All, ..InputMask::default() };
            self.experts.push(masked("the short history", mask));
        } else {
            self.left_out.insert("the short history", "the expert does not read it");
        }
    }
}

/// The places of the numeric columns that effects of counters fill; with the rates and counts that
/// are left, each counter speaks for itself.
fn effect_columns(schema: &Schema) -> Vec<usize> {
    let counters = schema.counters.iter().filter(|counter| schema.has_effect(counter));
    let of_counters = counters.map(|counter| format!("{}_effect", counter.name));
    let actions = schema.effect_actions().map(|action| &schema.actions[action]);
    let of_actions =
        actions.flat_map(|action| ["log_odds", "doubt"].map(|kind| format!("{action}_{kind}")));
    let effects: Vec<String> = of_counters.chain(of_actions).collect();
    let columns = schema.feature_columns().into_iter().enumerate();
    columns.filter(|(_, name)| effects.contains(name)).map(|(at, _)| at).collect()
}
