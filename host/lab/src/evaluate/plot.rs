//! Progressive NE over the stream as an SVG, a panel per task, a line per arm; below it what was
//! predicted against what happened.

use std::fmt::Write;

use super::{reliability_plot, scores::CurvePoint, window::TestWindow};
use crate::reliability::Reliability;

pub(super) const WIDTH: f64 = 900.0;
const PANEL: f64 = 220.0;
const LEFT: f64 = 60.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 30.0;
const BOTTOM: f64 = 30.0;
/// Height of the legend.
const HEAD: f64 = 34.0;

/// The arms that are drawn: their names in points, their titles, and their colours (Okabe and
/// Ito's, which colour-blind readers can distinguish).
pub(super) const ARMS: [(&str, &str, &str); 3] = [
    ("fm", "FM head", "#0072b2"),
    ("expert", "expert without TAE", "#e69f00"),
    ("expert+tae", "expert with TAE", "#009e73"),
];

/// Draws the points of a stream, marks the beginning of the test, and draws the reliability in it.
pub fn svg(points: &[CurvePoint], reliability: &Reliability, window: &TestWindow) -> String {
    let mut tasks: Vec<&str> = Vec::new();
    for point in points {
        if !tasks.contains(&point.task.as_str()) {
            tasks.push(&point.task);
        }
    }
    let panels = HEAD + PANEL * tasks.len().max(1) as f64;
    let mut squares = String::new();
    let height = reliability_plot::draw(&mut squares, panels, reliability);
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    for (at, (_, name, colour)) in ARMS.iter().enumerate() {
        let x = LEFT + at as f64 * 180.0;
        line(&mut text, [x, 16.0, x + 24.0, 16.0], &format!("\"{colour}\" stroke-width=\"2\""));
        label(&mut text, x + 30.0, 20.0, "start", name);
    }
    for (at, task) in tasks.iter().enumerate() {
        let own: Vec<&CurvePoint> = points.iter().filter(|point| point.task == **task).collect();
        panel(&mut text, HEAD + at as f64 * PANEL, task, &own, window);
    }
    text + &squares + "</svg>\n"
}

/// Maps times and values into a panel.
struct PanelScale {
    top: f64,
    times: (f64, f64),
    values: (f64, f64),
}

impl PanelScale {
    fn x(&self, time_ms: i64) -> f64 {
        let share = (time_ms as f64 - self.times.0) / (self.times.1 - self.times.0).max(1.0);
        LEFT + share * (WIDTH - LEFT - RIGHT)
    }

    fn y(&self, value: f64) -> f64 {
        let share = (value - self.values.0) / (self.values.1 - self.values.0);
        self.top + PANEL - BOTTOM - share.clamp(0.0, 1.0) * (PANEL - TOP - BOTTOM)
    }
}

fn panel(text: &mut String, top: f64, task: &str, points: &[&CurvePoint], window: &TestWindow) {
    let drawn = |point: &&&CurvePoint| ARMS.iter().any(|(arm, ..)| *arm == point.arm);
    let values: Vec<f64> = points.iter().filter(drawn).map(|point| point.ne).collect();
    let scale = PanelScale {
        top,
        times: (window.first_ms as f64, window.last_ms as f64),
        values: bounds(&values),
    };
    let (right, bottom) = (WIDTH - RIGHT, top + PANEL - BOTTOM);
    let title = format!("<tspan font-weight=\"bold\">NE of {}</tspan>", escape(task));
    label(text, LEFT, top + TOP - 10.0, "start", &title);
    for tick in 0..=4 {
        let value = scale.values.0 + (scale.values.1 - scale.values.0) * f64::from(tick) / 4.0;
        let y = scale.y(value);
        line(text, [LEFT, y, right, y], "\"#ddd\"");
        label(text, LEFT - 6.0, y + 4.0, "end", &format!("{value:.3}"));
    }
    for (time_ms, anchor) in [(window.first_ms, "start"), (window.last_ms, "end")] {
        label(text, scale.x(time_ms), bottom + 18.0, anchor, &window.format(time_ms));
    }
    let x = scale.x(window.test_from_ms);
    let anchor = if x > WIDTH / 2.0 { "end" } else { "start" };
    line(text, [x, top + TOP, x, bottom], "\"#888\" stroke-dasharray=\"4 3\"");
    let test = format!("test from {}", window.format(window.test_from_ms));
    label(text, x, top + TOP - 10.0, anchor, &test);
    for (arm, _, colour) in ARMS {
        let places: Vec<String> = points
            .iter()
            .filter(|point| point.arm == arm)
            .map(|point| format!("{:.1},{:.1}", scale.x(point.time_ms), scale.y(point.ne)))
            .collect();
        let _ = writeln!(
            text,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.8\"/>",
            places.join(" ")
        );
    }
}

/// A line from a point to another; `stroke` is its colour, quoted, and any other attributes.
pub(crate) fn line(svg: &mut String, [x1, y1, x2, y2]: [f64; 4], stroke: &str) {
    *svg += &format!(
        "<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" stroke={stroke}/>\n"
    );
}

/// A text at a point, with its SVG anchor.
pub(crate) fn label(svg: &mut String, x: f64, y: f64, anchor: &str, text: &str) {
    *svg += &format!("<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{text}</text>\n");
}

/// The range of the values without the worst twentieth: the beginning of training would stretch it.
fn bounds(values: &[f64]) -> (f64, f64) {
    let mut sorted: Vec<f64> = values.iter().copied().filter(|value| value.is_finite()).collect();
    sorted.sort_unstable_by(f64::total_cmp);
    let Some(&low) = sorted.first() else { return (0.0, 1.0) };
    let high = sorted[(sorted.len() - 1) * 19 / 20];
    let margin = ((high - low) * 0.05).max(0.005);
    (low - margin, high + margin)
}

/// A text without what XML takes for marks.
pub(crate) fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reliability::{ReliabilityBin, ReliabilityCurve};
    use hypercast_train::report::ALL;

    #[test]
    fn every_task_has_a_panel_and_every_arm_a_line() {
        let window = TestWindow {
            first_ms: 0,
            last_ms: 40_000_000,
            test_from_ms: 20_000_000,
            report_from_ms: 20_000_000,
            utc_offset_h: 0,
        };
        let point = |task: &str, arm: &'static str, at: i64| CurvePoint {
            task: task.into(),
            arm,
            time_ms: at * 10_000_000,
            n: 100,
            ne: 0.8 + at as f64 / 100.0,
        };
        let points: Vec<CurvePoint> = ["a<b", "c"]
            .into_iter()
            .flat_map(|task| {
                ["fm", "expert", "expert+tae", "base"]
                    .into_iter()
                    .flat_map(move |arm| (0..4).map(move |at| point(task, arm, at)))
            })
            .collect();
        let bin = |predicted: f64| ReliabilityBin { n: 9, predicted, observed: predicted * 0.9 };
        let curve = |surface: &str, arm: &str| ReliabilityCurve {
            surface: surface.into(),
            task: "a<b".into(),
            arm: arm.into(),
            ece: 0.01,
            bins: vec![bin(0.1), bin(0.3)],
        };
        let curves = [curve("feed", "fm"), curve(ALL, "base"), curve(ALL, "fm")];
        let text = svg(&points, &Reliability(curves.to_vec()), &window);
        assert_eq!(text.matches("<polyline").count(), 6 + 1, "one arm of all surfaces is drawn");
        assert!(text.contains("reliability of a&lt;b") && text.contains("viewBox=\"0 0 900 764\""));
        assert!(text.contains("NE of a&lt;b") && text.contains("test from 1970-01-01 05:33"));
        assert!(text.starts_with("<svg") && text.ends_with("</svg>\n") && !text.contains("NaN"));
        assert!(
            svg(&[], &Reliability::default(), &window).ends_with("</svg>\n"),
            "nothing to draw is no fault"
        );
    }
}
