//! The laws as an SVG: a panel for each, NE over training FLOPs in powers of ten.

use std::collections::BTreeMap;

use super::{LawSubject, ScalingLaw, ScalingPoint};
use crate::evaluate::plot::{escape, label, line};

const WIDTH: f64 = 900.0;
const PANEL: f64 = 320.0;
const LEFT: f64 = 60.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 66.0;
const BOTTOM: f64 = 34.0;
/// Okabe and Ito's colours, which colour-blind readers can distinguish.
const FITTED: &str = "#0072b2";
const LAW: &str = "#d55e00";
const OTHERS: &str = "#999999";

/// Draws a panel for each law.
pub fn svg(laws: &[ScalingLaw]) -> String {
    let height = PANEL * laws.len().max(1) as f64;
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    for (at, law) in laws.iter().enumerate() {
        panel(&mut text, at as f64 * PANEL, law);
    }
    text + "</svg>\n"
}

/// Maps costs and NE into a panel.
struct LawScale {
    top: f64,
    /// Powers of ten.
    costs: [f64; 2],
    ne: [f64; 2],
}

impl LawScale {
    fn x(&self, flops: f64) -> f64 {
        let [low, high] = self.costs;
        LEFT + (flops.log10() - low) / (high - low) * (WIDTH - LEFT - RIGHT)
    }

    fn y(&self, ne: f64) -> f64 {
        let share = (ne - self.ne[0]) / (self.ne[1] - self.ne[0]);
        self.top + PANEL - BOTTOM - share.clamp(0.0, 1.0) * (PANEL - TOP - BOTTOM)
    }
}

fn panel(text: &mut String, top: f64, law: &ScalingLaw) {
    let shown: Vec<&ScalingPoint> =
        law.points.iter().filter(|point| point.ne.is_finite()).collect();
    let of = match law.of {
        LawSubject::Fm => "the FM",
        LawSubject::FmAllData => "the FM after all data, by size",
        LawSubject::Expert => "experts, by the FM's size",
    };
    let title = format!("<tspan font-weight=\"bold\">NE of {}: {of}</tspan>", escape(&law.task));
    label(text, LEFT, top + 18.0, "start", &title);
    let said = law.to_string();
    let said = said.split_once(": ").map_or("", |(_, said)| said);
    for (at, said) in said.lines().enumerate() {
        let small = format!("<tspan font-size=\"11\">{}</tspan>", escape(said));
        label(text, LEFT, top + 34.0 + 14.0 * at as f64, "start", &small);
    }
    if shown.is_empty() {
        return;
    }
    let range = |of: &dyn Fn(&ScalingPoint) -> f64| {
        let values = || shown.iter().map(|point| of(point));
        [values().fold(f64::MAX, f64::min), values().fold(f64::MIN, f64::max)]
    };
    let ([low, high], [best, worst]) = (range(&|p| p.flops.log10()), range(&|p| p.ne));
    let margin = ((worst - best) * 0.06).max(1e-4);
    let scale =
        LawScale { top, costs: [low - 0.1, high + 0.1], ne: [best - margin, worst + margin] };
    axes(text, &scale);
    curve(text, &scale, law);
    let mut by_model: BTreeMap<&str, Vec<&ScalingPoint>> = BTreeMap::new();
    for point in shown {
        by_model.entry(&point.model).or_default().push(point);
    }
    for (model, points) in by_model {
        draw_model(text, &scale, model, &points);
    }
}

fn axes(text: &mut String, scale: &LawScale) {
    let bottom = scale.top + PANEL - BOTTOM;
    for tick in 0..=4 {
        let ne = scale.ne[0] + (scale.ne[1] - scale.ne[0]) * f64::from(tick) / 4.0;
        let y = scale.y(ne);
        line(text, [LEFT, y, WIDTH - RIGHT, y], "\"#ddd\"");
        label(text, LEFT - 6.0, y + 4.0, "end", &format!("{ne:.4}"));
    }
    for power in scale.costs[0].ceil() as i32..=scale.costs[1].floor() as i32 {
        let x = scale.x(10f64.powi(power));
        line(text, [x, scale.top + TOP, x, bottom], "\"#ddd\"");
        label(text, x, bottom + 16.0, "middle", &format!("1e{power}"));
    }
    label(text, WIDTH - RIGHT, bottom + 30.0, "end", "training FLOPs");
}

/// The fitted law, from the cheapest point to the most expensive one.
fn curve(text: &mut String, scale: &LawScale, law: &ScalingLaw) {
    let Some(fit) = law.law.fit else { return };
    let [low, high] = scale.costs;
    let place = |step: i32| {
        let flops = 10f64.powf(low + (high - low) * f64::from(step) / 60.0);
        format!("{:.1},{:.1}", scale.x(flops), scale.y(fit.at(flops)))
    };
    let places: Vec<String> = (0..=60).map(place).collect();
    *text += &format!(
        "<polyline points=\"{}\" fill=\"none\" stroke=\"{LAW}\" stroke-width=\"1.8\"/>\n",
        places.join(" ")
    );
}

/// A model's points, in the order of its training.
fn draw_model(text: &mut String, scale: &LawScale, model: &str, points: &[&ScalingPoint]) {
    for pair in points.windows(2) {
        let [a, b] = [pair[0], pair[1]].map(|point| [scale.x(point.flops), scale.y(point.ne)]);
        line(text, [a[0], a[1], b[0], b[1]], &format!("\"{OTHERS}\""));
    }
    for point in points {
        let colour = if point.fitted { FITTED } else { OTHERS };
        *text += &format!(
            "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"3.5\" fill=\"{colour}\"/>\n",
            scale.x(point.flops),
            scale.y(point.ne)
        );
    }
    if let Some(last) = points.last() {
        let name = format!("<tspan font-size=\"10\" fill=\"#555\">{}</tspan>", escape(model));
        label(text, scale.x(last.flops) - 6.0, scale.y(last.ne) + 12.0, "end", &name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::experiment::scaling::law::{LawFit, PowerFit};

    #[test]
    fn a_law_has_its_points_and_its_curve() {
        let point = |at: i32| ScalingPoint {
            model: format!("d{}<", at / 2),
            share: 1.0,
            flops: 10f64.powi(9 + at),
            ne: 0.9 - 0.01 * f64::from(at),
            fitted: at % 2 == 0,
        };
        let fit = PowerFit { floor: 0.7, scale: 0.1, exponent: 0.1, reference_flops: 1e11 };
        let law = |fit: Option<PowerFit>, points: i32| ScalingLaw {
            task: "a<b".into(),
            of: LawSubject::Fm,
            floor_is_known: true,
            law: LawFit {
                fit,
                exponent_ci95: Some([0.08, 0.12]),
                fall_pct: 4.0,
                ne: Vec::new(),
                fitted: Vec::new(),
                on_envelope: Vec::new(),
            },
            models_on_envelope: 2,
            largest: None,
            is_seen: fit.is_some(),
            shortfalls: Vec::new(),
            points: (0..points).map(point).collect(),
        };
        let text = svg(&[law(Some(fit), 5), law(None, 0)]);
        assert_eq!(text.matches("<circle").count(), 5);
        assert_eq!(text.matches(FITTED).count(), 3);
        assert_eq!(text.matches("<polyline").count(), 1);
        assert!(text.contains("NE of a&lt;b") && text.contains("d2&lt;"), "{text}");
        assert!(text.contains("b = 0.100 [0.080, 0.120]") && text.contains("no law can be seen"));
        assert!(text.ends_with("</svg>\n") && !text.contains("NaN") && !text.contains("inf"));
    }
}
