//! Which expert serves which surface. A registry is immutable; the daemon swaps
//! a whole one, so that a request sees one set of experts.

use std::collections::HashMap;
use std::sync::Arc;

use super::Error;
use super::runtime::Expert;
use crate::schema::Schema;

/// The experts of one surface.
#[derive(Clone)]
pub struct Route {
    /// The expert that answers.
    pub active: Arc<Expert>,
    /// Experts that see the same requests and whose answers are only measured.
    pub shadows: Vec<Arc<Expert>>,
}

/// Routes by surface; several surfaces may share an expert.
#[derive(Clone, Default)]
pub struct Registry {
    routes: HashMap<u16, Route>,
}

impl Registry {
    /// No expert yet.
    pub fn new() -> Registry {
        Registry::default()
    }

    /// Routes `surface` to `route`. An error where the surface is unknown or
    /// one of the experts does not serve it.
    pub fn insert(&mut self, schema: &Schema, surface: &str, route: Route) -> Result<(), Error> {
        let experts = std::iter::once(&route.active).chain(&route.shadows);
        let Some(index) = schema.surfaces.iter().position(|known| known == surface) else {
            let why = format!("it is routed to surface `{surface}`, which the schema lacks");
            return Err(Error::refused(route.active.name(), why));
        };
        for expert in experts {
            if !expert.blueprint().serves(surface) {
                let serves = expert.blueprint().description.surfaces.join("`, `");
                return Err(Error::refused(
                    expert.name(),
                    format!("it serves `{serves}`, not surface `{surface}`"),
                ));
            }
        }
        self.routes.insert(index as u16, route);
        Ok(())
    }

    /// The experts of a surface (an index into `schema.surfaces`).
    pub fn route(&self, surface: u16) -> Option<&Route> {
        self.routes.get(&surface)
    }

    /// Every expert once, for metrics.
    pub fn experts(&self) -> Vec<Arc<Expert>> {
        let mut experts: Vec<Arc<Expert>> = Vec::new();
        let mut surfaces: Vec<&u16> = self.routes.keys().collect();
        surfaces.sort_unstable();
        for route in surfaces.into_iter().map(|surface| &self.routes[surface]) {
            for expert in std::iter::once(&route.active).chain(&route.shadows) {
                if !experts.iter().any(|known| Arc::ptr_eq(known, expert)) {
                    experts.push(expert.clone());
                }
            }
        }
        experts
    }
}
